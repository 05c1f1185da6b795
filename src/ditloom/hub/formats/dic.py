"""State dicts of YuchuanTian/DiC (dic_models.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ditloom.backbones.dic import DiCConfig
from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, split_null
from ditloom.hub.keymap import POINTWISE, SAME, Change, KeyMap, Move, Placed

STAGES = ("enc_blocks.0", "enc_blocks.1", "lat_blocks.0", "dec_blocks.0", "dec_blocks.1")
GLUE = ("downs.0", "downs.1", "ups.0", "ups.1")


def _places(config: Any) -> Mapping[int, Mapping[str, str]]:
    """Their module of every flat position."""
    names: list[str] = []
    for stage, depth, glue in zip(STAGES, config.depths, (*GLUE, None), strict=True):
        names += [f"{stage}.{b}.conv" for b in range(depth)]
        names += [glue] if glue else []
    return {i: {"place": name} for i, name in enumerate(names)}


def _at(theirs: str, ours: str, change: Change = SAME) -> Placed:
    return Placed("{place}." + theirs, "blocks.{i}." + ours, change, places=_places)


@register("dic", paper="DiC: Rethinking Conv3x3 Designs in Diffusion Models, arXiv 2501.00603")
class DiCStateDict(Format):
    """A released checkpoint, or the "ema" of a training run."""

    family: ClassVar[str] = "dic"
    keymap: ClassVar[KeyMap] = KeyMap(
        _at("norm0.{p}", "norm1.{p}"),
        _at("norm1.{p}", "norm2.{p}"),
        _at("conv0.{p}", "conv1.{p}"),
        _at("conv1.{p}", "conv2.{p}"),
        _at("affine.1.{p}", "modulation.linear.{p}"),
        _at("skip.{p}", "skip_linear.{p}", POINTWISE),
        _at("body.0.weight", "conv.weight"),
        Move("t_embedder_ls.{i}.{rest}", "conditions.time.{i}.{rest}"),
        Move("y_embedder_ls.{i}.{rest}", "conditions.label.{i}.{rest}"),
        Move("final_layer.out_proj.{p}", "final_layer.proj.{p}"),
        Move("final_layer.adaLN_modulation.1.{p}", "final_layer.modulation.linear.{p}"),
        Move("{rest}", "{rest}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        return {"enc_blocks.0.0.conv.affine.1.weight", "lat_blocks.0.0.conv.conv0.weight"} <= foreign.tensors.keys()

    def config(self, foreign: Foreign) -> DiCConfig:
        width, channels, *_ = foreign.shape("x_embedder.proj.weight")
        table = "y_embedder_ls.0.embedding_table.weight"
        classes, null = split_null(foreign.shape(table)[0]) if table in foreign.tensors else (0, True)
        return DiCConfig(
            width=width,
            depths=tuple(foreign.count(stage.replace(".", r"\.") + r"\.(\d+)\.") for stage in STAGES),
            skip_stride=_stride(foreign),
            channels=channels,
            classes=classes,
            null_class=null,
            learn_sigma=foreign.shape("final_layer.out_proj.weight")[0] == 2 * channels,
        )


def _stride(foreign: Foreign) -> int:
    """From block to block that a long skip enters on the way up."""
    stages = [[b for b in range(100) if f"{s}.{b}.conv.skip.weight" in foreign.tensors] for s in STAGES[3:]]
    for stage, entered in zip(STAGES[3:], stages, strict=True):
        if len(entered) > 1:
            return entered[1]
        if not entered:
            raise UserError(f"{foreign.name} has no long skip in {stage}: a DiC has one at its start")
    return max(foreign.count(s.replace(".", r"\.") + r"\.(\d+)\.") for s in STAGES[3:])
