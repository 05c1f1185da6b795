"""SiT."""

from __future__ import annotations

from ditloom.backbones.sit import SiTConfig
from tests.backbones.portrait import LATENT, Portrait

PORTRAIT = Portrait(
    tiny={"sit": SiTConfig(**LATENT, classes=10)},
    counts={
        "SiT-S/2": 32_865_056,
        "SiT-S/4": 32_920_448,
        "SiT-S/8": 33_142_016,
        "SiT-B/2": 130_315_808,
        "SiT-B/4": 130_426_496,
        "SiT-B/8": 130_869_248,
        "SiT-L/2": 457_840_672,
        "SiT-L/4": 457_988_224,
        "SiT-L/8": 458_578_432,
        "SiT-XL/2": 674_834_720,
        "SiT-XL/4": 675_000_704,
        "SiT-XL/8": 675_664_640,
    },
)
