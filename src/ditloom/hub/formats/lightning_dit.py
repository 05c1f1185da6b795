"""State dicts of hustvl/LightningDiT; the rotary tables are stored beside the weights."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ditloom.backbones import lightning_dit
from ditloom.backbones.lightning_dit import LightningDiTConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, refuse_unless
from ditloom.hub.formats.facebook_dit import (
    MODULATIONS,
    POSITIONS,
    REST,
    has_adaln_blocks,
    is_grown,
    is_modern,
    read_sizes,
)
from ditloom.hub.keymap import Derived, KeyMap, Move
from ditloom.parts.positions import axial_axes, grid_positions, rotary


def _table(config: LightningDiTConfig, part: int) -> Tensor | None:
    if not config.rope:
        return None
    side = config.image_size // config.patch
    return rotary(grid_positions(side, side), axial_axes(config.width // config.heads), config.theta)[part]


@register("lightning-dit", paper="Reconstruction vs. Generation, arXiv 2501.01423")
class LightningDiTStateDict(Format):
    """lightningdit-xl-*.pt: {ema: state dict}, and what train.py of that repository writes."""

    family: ClassVar[str] = "lightning-dit"
    keymap: ClassVar[KeyMap] = KeyMap(
        POSITIONS,
        Derived("feat_rope.freqs_cos", lambda c: _table(c, 0), "rotary table"),
        Derived("feat_rope.freqs_sin", lambda c: _table(c, 1), "rotary table"),
        *MODULATIONS,
        Move("final_layer.norm_final.{p}", "final_layer.norm.{p}"),
        REST,
    )

    def recognises(self, foreign: Foreign) -> bool:
        return has_adaln_blocks(foreign) and is_modern(foreign) and not is_grown(foreign)

    def config(self, foreign: Foreign) -> LightningDiTConfig:
        keys = foreign.tensors
        sizes = read_sizes(foreign, lightning_dit.PRESETS, "LightningDiT", _heads(foreign))
        width = sizes["width"]
        swiglu = "blocks.0.mlp.w12.weight" in keys
        return LightningDiTConfig(
            **sizes,
            mlp_ratio=4.0 if swiglu else foreign.shape("blocks.0.mlp.fc1.weight")[0] / width,
            rms_norm="blocks.0.norm1.weight" in keys,
            swiglu=swiglu,
            rope="feat_rope.freqs_cos" in keys,
            qk_norm="blocks.0.attn.q_norm.weight" in keys,
            shift=foreign.shape("blocks.0.adaLN_modulation.1.weight")[0] == 6 * width,
        )

    def settings(self, config: Any) -> dict[str, Any]:
        refuse_unless(config, "lightning-dit", attention="softmax")
        return {}


def _heads(foreign: Foreign) -> int | None:
    """Heads, where a tensor has the size of one."""
    for key in ("blocks.0.attn.q_norm.weight", "feat_rope.freqs_cos"):
        if key in foreign.tensors:
            return foreign.shape("x_embedder.proj.weight")[0] // foreign.shape(key)[-1]
    return None
