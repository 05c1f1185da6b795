"""State dicts of YuchuanTian/U-DiT (udit_models.py), in training form (rep=1, as released) and plain (rep=0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ditloom.backbones.u_dit import UDiTConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, split_null
from ditloom.hub.keymap import POINTWISE, SAME, Change, KeyMap, Move, Placed

LEVELS = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")
GLUE = (("down1_2",), ("down2_3",), ("up3_2", "reduce_chan_level2"), ("up2_1", "reduce_chan_level1"), ())


class PerHead(Change):
    """[heads, 1] as [heads, 1, 1]."""

    def out(self, ours: Tensor) -> Tensor:
        return ours[..., None]

    def back(self, theirs: Tensor, like: Tensor) -> Tensor:
        return theirs.reshape(like.shape)


def _places(config: Any) -> Mapping[int, Mapping[str, Any]]:
    """Their module of every flat position, and which half of it."""
    found: list[dict[str, Any]] = []
    for level, depth, glue in zip(LEVELS, config.depths, GLUE, strict=True):
        found += [{"place": f"{level}.{j}", "half": half} for j in range(depth) for half in (1, 2)]
        found += [{"place": name, "half": ""} for name in glue]
    return dict(enumerate(found))


def _at(theirs: str, ours: str, change: Change = SAME) -> Placed:
    return Placed("{place}." + theirs, "blocks.{i}." + ours, change, places=_places)


@register("u-dit", paper="U-DiTs: Downsample Tokens in U-Shaped Diffusion Transformers, arXiv 2405.02730")
class UDiTStateDict(Format):
    """A released checkpoint, or the "ema" of a training run."""

    family: ClassVar[str] = "u-dit"
    keymap: ClassVar[KeyMap] = KeyMap(
        _at("attn{half}.downsampler.layer.{p}", "attn.conv.{p}"),
        _at("attn{half}.to_qkv.{p}", "attn.projections.qkv.{p}"),
        _at("attn{half}.to_out.{p}", "attn.projections.proj.{p}", POINTWISE),
        _at("attn{half}.logit_scale", "attn.projections.q_norm.logit_scale", PerHead()),
        _at("mlp{half}.project_in.0.{p}", "mlp.fc1.first.{p}", POINTWISE),
        _at("mlp{half}.project_in.1.{p}", "mlp.fc1.second.{p}", POINTWISE),
        _at("mlp{half}.project_out.0.{p}", "mlp.fc2.first.{p}", POINTWISE),
        _at("mlp{half}.project_out.1.{p}", "mlp.fc2.second.{p}", POINTWISE),
        _at("mlp{half}.dwconv.{rest}", "mlp.branches.{rest}"),
        _at("mlp{half}.project_in.{p}", "mlp.fc1.{p}", POINTWISE),
        _at("mlp{half}.project_out.{p}", "mlp.fc2.{p}", POINTWISE),
        _at("mlp{half}.dwconv.{p}", "mlp.conv.{p}"),
        _at("adaLN_modulation{half}.1.{p}", "modulation.linear.{p}"),
        _at("body.0.weight", "conv.weight"),
        Placed("{place}.{p}", "blocks.{i}.linear.{p}", POINTWISE, places=_places),
        *(Move(f"t_embedder_{s + 1}.{{rest}}", f"conditions.time.{s}.{{rest}}") for s in range(3)),
        *(Move(f"y_embedder_{s + 1}.{{rest}}", f"conditions.label.{s}.{{rest}}") for s in range(3)),
        Move("final_layer.out_proj.{p}", "final_layer.proj.{p}"),
        Move("final_layer.adaLN_modulation.1.{p}", "final_layer.modulation.linear.{p}"),
        Move("{rest}", "{rest}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        tops = {key.partition(".")[0] for key in foreign.tensors}
        return {*LEVELS, "reduce_chan_level1", "reduce_chan_level2"} <= tops

    def config(self, foreign: Foreign) -> UDiTConfig:
        keys = foreign.tensors
        width, channels, *_ = foreign.shape("x_embedder.proj.weight")
        table = "y_embedder_1.embedding_table.weight"
        classes, null = split_null(foreign.shape(table)[0]) if table in keys else (0, True)
        convolution = "weight" if _is_plain(foreign) else "0.weight"
        hidden = foreign.shape(f"latent.0.mlp1.dwconv.{convolution}")[0]
        return UDiTConfig(
            width=width,
            heads=foreign.shape("latent.0.attn1.logit_scale")[0],
            depths=tuple(foreign.count(rf"{level}\.(\d+)\.") for level in LEVELS),
            merged=_is_plain(foreign),
            channels=channels,
            classes=classes,
            null_class=null,
            learn_sigma=foreign.shape("final_layer.out_proj.weight")[0] == 2 * channels,
            mlp_ratio=hidden / (4 * width),
        )


def _is_plain(foreign: Foreign) -> bool:
    return "latent.0.mlp1.dwconv.weight" in foreign.tensors
