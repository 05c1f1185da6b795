"""One configuration of every family to time: realistic widths, few blocks, 256 image tokens or 512 of a video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditloom.backbones.d2it import D2iTConfig
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
from ditloom.backbones.hunyuan_dit import HunyuanDiTConfig
from ditloom.backbones.latte import LatteConfig
from ditloom.backbones.li_dit import LiDiTConfig
from ditloom.backbones.lightning_dit import LightningDiTConfig
from ditloom.backbones.mmdit import MMDiTConfig
from ditloom.backbones.pixart_sigma import PixArtConfig
from ditloom.backbones.sana import SanaConfig
from ditloom.backbones.sit import SiTConfig
from ditloom.backbones.skip_dit import SkipDiTConfig
from ditloom.backbones.stdit import STDiTConfig
from ditloom.backbones.terdit import TerDiTConfig
from ditloom.backbones.u_dit import UDiTConfig
from ditloom.backbones.u_vit import UViTConfig
from ditloom.backbones.wan import WanConfig
from ditloom.contracts.backbone import BackboneConfig

Settings = Mapping[str, Any]

IMAGE: Settings = {"width": 384, "heads": 6, "image_size": 32}
CLASSES: Settings = {**IMAGE, "depth": 4, "learn_sigma": False}
TEXT: Settings = {**IMAGE, "text_width": 768, "text_tokens": 64}
READ: Settings = {**TEXT, "depth": 4, "learn_sigma": False}
JOINT: Settings = {**TEXT, "pooled_width": 256}
VIDEO: Settings = {"width": 384, "heads": 6, "text_width": 768, "text_tokens": 64, "depth": 4}
FLUX: Settings = {**JOINT, "depth": 2, "single_depth": 3, "axes": (16, 24, 24)}

CONFIGS: dict[str, BackboneConfig] = {
    "d2it": D2iTConfig(**CLASSES, refine_width=192, refine_heads=3),
    "ddt": DDTConfig(**IMAGE, depth=3, head_depth=2),
    "dense2moe": Dense2MoEConfig(**FLUX),
    "dic": DiCConfig(width=96, depths=(1, 1, 2, 1, 1), learn_sigma=False),
    "dimsum": DiMSUMConfig(depth=4, width=384, heads=6, every=2),
    "dint": DintConfig(**CLASSES),
    "dis": DiSConfig(depth=4, width=384, learn_sigma=False),
    "dit": DiTConfig(**CLASSES, frequency_shift=1),
    "dit-air": DiTAirConfig(**JOINT, depth=4),
    "dit-dh": DiTDHConfig(depth=3, width=384, heads=6, head_depth=2, head_width=768, head_heads=12),
    "dit-moe": DiTMoEConfig(**CLASSES),
    "dydit": DyDiTConfig(**CLASSES),
    "flexdit": FlexDiTConfig(**{**CLASSES, "depth": 6}, pooling=1, groups=1, group=(1, 1, 1, 1), dense=1),
    "flux": FluxConfig(**FLUX),
    "hidream": HiDreamConfig(
        **{**FLUX, "axes": (32, 16, 16)}, llama_width=512, llama_tokens=64, layers=tuple(range(5))
    ),
    "hunyuan-dit": HunyuanDiTConfig(**READ, t5_width=512, t5_tokens=64),
    "latte": LatteConfig(**VIDEO, image_size=16, frames=8, learn_sigma=False),
    "li-dit": LiDiTConfig(**JOINT, depth=3),
    "lightning-dit": LightningDiTConfig(width=384, heads=6, depth=4),
    "mmdit": MMDiTConfig(**JOINT, depth=3),
    "pixart-sigma": PixArtConfig(**READ, interpolation=1.0),
    "sana": SanaConfig(depth=4, width=384, heads=12, cross_heads=6, image_size=16, text_width=768, text_tokens=64),
    "sit": SiTConfig(**CLASSES),
    "skip-dit": SkipDiTConfig(**CLASSES),
    "stdit": STDiTConfig(**VIDEO, size=(8, 16, 16), learn_sigma=False),
    "terdit": TerDiTConfig(**CLASSES),
    "u-dit": UDiTConfig(width=96, heads=4, depths=(1, 1, 1, 1, 1), learn_sigma=False),
    "u-vit": UViTConfig(width=384, heads=6, depth=4, classes=1000),
    "wan": WanConfig(**VIDEO, hidden=1536, size=(8, 16, 16)),
}
