"""Each family at a given width, for 8x8 latents of 16 channels; the study picks the width that costs the same.

Not here: SiT (trained alike it is DiT), Hunyuan-DiT (256 tokens of 2,048 of its second encoder are fixed), D2iT (its
map of fine regions comes from looking at the picture first) and the video families.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ditloom.backbones.ddt import DDTConfig
from ditloom.backbones.dense2moe import Dense2MoEConfig
from ditloom.backbones.dic import DiCConfig
from ditloom.backbones.dimsum import DiMSUMConfig
from ditloom.backbones.dint import DintConfig
from ditloom.backbones.dis import DiSConfig
from ditloom.backbones.dit import DiTConfig
from ditloom.backbones.dit_air import DiTAirConfig
from ditloom.backbones.dit_dh import DiTDHConfig
from ditloom.backbones.dit_moe import DiTMoEConfig
from ditloom.backbones.dydit import DyDiTConfig
from ditloom.backbones.flexdit import FlexDiTConfig
from ditloom.backbones.flux import FluxConfig
from ditloom.backbones.hidream import HiDreamConfig
from ditloom.backbones.li_dit import LiDiTConfig
from ditloom.backbones.lightning_dit import LightningDiTConfig
from ditloom.backbones.mmdit import MMDiTConfig
from ditloom.backbones.pixart_sigma import PixArtConfig
from ditloom.backbones.sana import SanaConfig
from ditloom.backbones.skip_dit import SkipDiTConfig
from ditloom.backbones.terdit import TerDiTConfig
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
    "sana": lambda w: SanaConfig(**shape(w), cross_heads=heads(w), text_scale=1.0, **TOKENS, **WORD),
    "dit-air": lambda w: DiTAirConfig(**shape(w), pooled_width=16, **TOKENS, **WORD),
    "hidream": lambda w: HiDreamConfig(
        **shape(w, 1),
        single_depth=2,
        layers=(0,) * 3,
        llama_width=16,
        llama_tokens=1,
        axes=rotary(w),
        pooled_width=16,
        **TOKENS,
        **WORD,
    ),
    "dit-moe": lambda w: DiTMoEConfig(**shape(w), experts=4, **TOKENS, **PLAIN),
    "flexdit": lambda w: FlexDiTConfig(
        **shape(w, 8), pooling=1, groups=1, group=(1, 2, 1, 1), dense=2, sides=(4,), **TOKENS, **PLAIN
    ),
    "terdit": lambda w: TerDiTConfig(**shape(w), multiple=16, **TOKENS, **PLAIN),
    "u-dit": lambda w: UDiTConfig(width=w // 2, heads=2, depths=(1, 1, 1, 1, 1), **LATENT, **PLAIN),
    "dic": lambda w: DiCConfig(width=w // 2, depths=(1, 1, 1, 1, 1), skip_stride=1, **LATENT, **PLAIN),
    "li-dit": lambda w: LiDiTConfig(
        **shape(w), refiner_depth=1, table=8, table_span=8, pooled_width=16, **TOKENS, **WORD
    ),
    "dense2moe": lambda w: Dense2MoEConfig(
        **shape(w, 2), single_depth=4, axes=rotary(w), pooled_width=16, experts=6, **OWN_TIME, **WORD
    ),
    "dis": lambda w: DiSConfig(depth=DEPTH, width=w, **TOKENS, **PLAIN),
    "dimsum": lambda w: DiMSUMConfig(**shape(w), fusion_heads=heads(w), every=DEPTH, **OWN_TIME, **CLASSES),
}
