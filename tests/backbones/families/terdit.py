"""TerDiT: counts of the official module; the larger is called 3B in the code and 4.2B in the paper."""

from __future__ import annotations

from ditloom.backbones.terdit import TerDiTConfig
from tests.backbones.portrait import LATENT, ODD_HEAD, Portrait

PORTRAIT = Portrait(
    tiny={
        "terdit": TerDiTConfig(**LATENT, classes=10, multiple=16),
        "terdit-narrow": TerDiTConfig(**ODD_HEAD, classes=10, multiple=8, condition=32, learn_sigma=False),
        "terdit-full": TerDiTConfig(**LATENT, classes=10, multiple=16, ternary=False),
    },
    outputs={"terdit": 8, "terdit-full": 8},
    counted=("TerDiT-600M/2",),
    counts={"TerDiT-600M/2": 609_885_856, "TerDiT-4.2B/2": 4_238_020_896},
)
