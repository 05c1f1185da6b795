"""LightningDiT."""

from __future__ import annotations

from ditloom.backbones.lightning_dit import LightningDiTConfig
from tests.backbones.portrait import ODD_HEAD, Portrait

PORTRAIT = Portrait(
    tiny={
        "lightning-dit": LightningDiTConfig(**ODD_HEAD, classes=10),
        "lightning-dit-all": LightningDiTConfig(**ODD_HEAD, classes=10, qk_norm=True, shift=False, learn_sigma=True),
    },
    counted=("LightningDiT-XL/1",),
    counts={
        "LightningDiT-B/1": 130_359_584,
        "LightningDiT-L/1": 457_890_816,
        "LightningDiT-XL/1": 674_961_824,
        "LightningDiT-1p0B/1": 1_029_007_904,
        "LightningDiT-1p6B/1": 1_631_308_368,
    },
)
