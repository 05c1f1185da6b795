"""DiT."""

from __future__ import annotations

from ditloom.backbones.dit import DiTConfig
from tests.backbones.portrait import LATENT, Portrait

PORTRAIT = Portrait(
    tiny={
        "dit": DiTConfig(**LATENT, classes=10),
        "dit-unconditional": DiTConfig(**LATENT, classes=0, learn_sigma=False),
    },
    outputs={"dit": 8},
    counted=("DiT-XL/2",),
    counts={
        "DiT-S/2": 32_865_056,
        "DiT-S/4": 32_920_448,
        "DiT-S/8": 33_142_016,
        "DiT-B/2": 130_315_808,
        "DiT-B/4": 130_426_496,
        "DiT-B/8": 130_869_248,
        "DiT-L/2": 457_840_672,
        "DiT-L/4": 457_988_224,
        "DiT-L/8": 458_578_432,
        "DiT-XL/2": 674_834_720,
        "DiT-XL/4": 675_000_704,
        "DiT-XL/8": 675_664_640,
    },
)
