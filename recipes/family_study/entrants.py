"""Each family at a given width, for 8x8 latents of 16 channels; the study picks the width that costs the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ditloom.backbones.ddt import DDTConfig
from ditloom.backbones.dint import DintConfig
from ditloom.backbones.dis import DiSConfig
from ditloom.backbones.dit import DiTConfig
from ditloom.backbones.dit_dh import DiTDHConfig
from ditloom.backbones.dydit import DyDiTConfig
from ditloom.backbones.flux import FluxConfig
from ditloom.backbones.hunyuan_dit import HunyuanDiTConfig
from ditloom.backbones.lightning_dit import LightningDiTConfig
from ditloom.backbones.mmdit import MMDiTConfig
from ditloom.backbones.pixart_sigma import PixArtConfig
from ditloom.backbones.skip_dit import SkipDiTConfig
from ditloom.backbones.u_dit import UDiTConfig
from ditloom.backbones.u_vit import UViTConfig
from ditloom.contracts.backbone import BackboneConfig
from ditloom.contracts.time import FLOW_1000

LATENT: dict[str, Any] = {"image_size": 8, "channels": 16, "time": FLOW_1000}
TOKENS: dict[str, Any] = {**LATENT, "patch": 1}
OWN_TIME: dict[str, Any] = {"patch": 1, "image_size": 8, "channels": 16}
CLASSES: dict[str, Any] = {"classes": 10}
PLAIN: dict[str, Any] = {**CLASSES, "learn_sigma": False}
WORD: dict[str, Any] = {"text_width": 16, "text_tokens": 1}
DEPTH = 4


def heads(width: int) -> int:
    """Heads of 32 features, or of 16 or 8 where that does not divide."""
    return next(width // size for size in (32, 16, 8) if width % size == 0)


def shape(width: int, depth: int = DEPTH) -> dict[str, int]:
    """Depth, width and heads."""
    return {"depth": depth, "width": width, "heads": heads(width)}


def rotary(width: int) -> tuple[int, int, int]:
    """How much of a head each of three axes turns: as FLUX, an eighth for the first."""
    size = width // heads(width)
    return (size - 2 * (size * 7 // 16 // 2 * 2), *[size * 7 // 16 // 2 * 2] * 2)  # type: ignore[return-value]


ENTRANTS: dict[str, Callable[[int], BackboneConfig]] = {
    "dit": lambda w: DiTConfig(**shape(w), **TOKENS, **PLAIN),
    "lightning-dit": lambda w: LightningDiTConfig(**shape(w), **TOKENS, **CLASSES),
    "ddt": lambda w: DDTConfig(**shape(w, 3), head_depth=1, **OWN_TIME, **CLASSES),
    "dit-dh": lambda w: DiTDHConfig(
        **shape(w),
        head_depth=1,
        head_width=2 * w,
        head_heads=2 * heads(w),
        patch=1,
        image_size=8,
        channels=16,
        **CLASSES,
    ),
    "dint": lambda w: DintConfig(**shape(w), **TOKENS, **PLAIN),
    "skip-dit": lambda w: SkipDiTConfig(**shape(w), **TOKENS, **PLAIN),
    "dydit": lambda w: DyDiTConfig(**shape(w), **TOKENS, **PLAIN),
    "u-vit": lambda w: UViTConfig(**shape(w), **TOKENS, **CLASSES),
    "mmdit": lambda w: MMDiTConfig(**shape(w), qk_norm="rms", table=8, table_span=8, pooled_width=16, **TOKENS, **WORD),
    "flux": lambda w: FluxConfig(**shape(w, 2), single_depth=4, axes=rotary(w), pooled_width=16, **OWN_TIME, **WORD),
    "pixart-sigma": lambda w: PixArtConfig(**shape(w), learn_sigma=False, **TOKENS, **WORD),
    "hunyuan-dit": lambda w: HunyuanDiTConfig(
        **shape(w), learn_sigma=False, pooled=16, pool_heads=2, base=None, **TOKENS, **WORD
    ),
    "u-dit": lambda w: UDiTConfig(width=w // 2, heads=2, depths=(1, 1, 1, 1, 1), **LATENT, **PLAIN),
    "dis": lambda w: DiSConfig(depth=DEPTH, width=w, **TOKENS, **PLAIN),
}
