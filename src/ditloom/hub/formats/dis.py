"""State dicts of feizc/DiS (models_dis.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ditloom.backbones.dis import DiSConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, split_null, square_side
from ditloom.hub.keymap import KeyMap, Move, Placed

DIRECTION = {
    "conv1d{b}.{{p}}": "conv.{p}",
    "x_proj{b}.weight": "x_proj.weight",
    "dt_proj{b}.{{p}}": "dt_proj.{p}",
    "A{b}_log": "A_log",
    "D{b}": "D",
}


def _places(config: Any) -> Mapping[int, Mapping[str, str]]:
    half = config.depth // 2
    names = [f"in_blocks.{i}" for i in range(half)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(half)]
    return {i: {"place": name} for i, name in enumerate(names)}


def _at(theirs: str, ours: str) -> Placed:
    return Placed("{place}." + theirs, "blocks.{i}." + ours, places=_places)


def mamba_names(ours: str, b: str) -> list[tuple[str, str]]:
    """(their name, ours) of one direction's tensors in the official Mamba module; b: "" ahead, "_b" back."""
    return [(theirs.format(b=b), f"{ours}.{name}") for theirs, name in DIRECTION.items()]


@register("dis", paper="Scalable Diffusion Models with State Space Backbone, arXiv 2402.05608")
class DiSStateDict(Format):
    """A released checkpoint, or the "ema" of a training run."""

    family: ClassVar[str] = "dis"
    keymap: ClassVar[KeyMap] = KeyMap(
        *(_at(f"mixer.{theirs}", f"mixer.{ours}") for theirs, ours in mamba_names("ahead", "")),
        *(_at(f"mixer.{theirs}", f"mixer.{ours}") for theirs, ours in mamba_names("back", "_b")),
        _at("{rest}", "{rest}"),
        Move("patch_embed.{rest}", "x_embedder.{rest}"),
        Move("time_embed.{rest}", "t_embedder.{rest}"),
        Move("label_emb.{rest}", "y_embedder.{rest}"),
        Move("norm_f.weight", "norm.weight"),
        Move("final_layer.linear.{p}", "final_layer.1.{p}"),
        Move("final_layer.adaLN_modulation.1.{p}", "final_layer.modulation.linear.{p}"),
        Move("{rest}", "{rest}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        return {"in_blocks.0.mixer.A_b_log", "mid_block.mixer.A_log", "norm_f.weight"} <= foreign.tensors.keys()

    def config(self, foreign: Foreign) -> DiSConfig:
        width, channels, patch, _ = foreign.shape("patch_embed.proj.weight")
        table = "label_emb.embedding_table.weight"
        classes, null = split_null(foreign.shape(table)[0]) if table in foreign.tensors else (0, True)
        tokens = foreign.shape("pos_embed")[1] - (2 if classes else 1)
        return DiSConfig(
            depth=2 * foreign.count(r"in_blocks\.(\d+)\."),
            width=width,
            patch=patch,
            image_size=patch * square_side(tokens, "pos_embed"),
            channels=channels,
            classes=classes,
            null_class=null,
            learn_sigma=foreign.shape("final_layer.linear.weight")[0] == 2 * patch**2 * channels,
            states=foreign.shape("mid_block.mixer.A_log")[1],
        )
