"""Each family at a given width, for 8x8 latents of 16 channels; the study picks the width that costs the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ditloom.backbones.dit import DiTConfig
from ditloom.backbones.lightning_dit import LightningDiTConfig
from ditloom.backbones.mmdit import MMDiTConfig
from ditloom.backbones.skip_dit import SkipDiTConfig
from ditloom.backbones.u_vit import UViTConfig
from ditloom.contracts.backbone import BackboneConfig
from ditloom.contracts.time import FLOW_1000

LATENT: dict[str, Any] = {"image_size": 8, "channels": 16, "time": FLOW_1000}
TOKENS: dict[str, Any] = {**LATENT, "patch": 1}
CLASSES: dict[str, Any] = {"classes": 10}
TEXT: dict[str, Any] = {"text_width": 16, "text_tokens": 1, "pooled_width": 16}


def heads(width: int) -> int:
    """Heads of 32 features, or of 16 or 8 where that does not divide."""
    return next(width // size for size in (32, 16, 8) if width % size == 0)


ENTRANTS: dict[str, Callable[[int], BackboneConfig]] = {
    "dit": lambda w: DiTConfig(depth=4, width=w, heads=heads(w), learn_sigma=False, **TOKENS, **CLASSES),
    "lightning-dit": lambda w: LightningDiTConfig(depth=4, width=w, heads=heads(w), **TOKENS, **CLASSES),
    "skip-dit": lambda w: SkipDiTConfig(depth=4, width=w, heads=heads(w), learn_sigma=False, **TOKENS, **CLASSES),
    "u-vit": lambda w: UViTConfig(depth=4, width=w, heads=heads(w), **TOKENS, **CLASSES),
    "mmdit": lambda w: MMDiTConfig(
        depth=4, width=w, heads=heads(w), qk_norm="rms", table=8, table_span=8, **TOKENS, **TEXT
    ),
}
