"""LightningDiT."""

from __future__ import annotations

from ditloom.backbones.lightning_dit import LightningDiTConfig
from tests.backbones.portrait import ODD_HEAD, Portrait

WIDTHS = {"B": 768, "L": 1024, "XL": 1152, "1p0B": 1536, "1p6B": 1792}
ONE = {"B": 130_359_584, "L": 457_890_816, "XL": 674_961_824, "1p0B": 1_029_007_904, "1p6B": 1_631_308_368}
PORTRAIT = Portrait(
    tiny={
        "lightning-dit": LightningDiTConfig(**ODD_HEAD, classes=10),
        "lightning-dit-all": LightningDiTConfig(**ODD_HEAD, classes=10, qk_norm=True, shift=False, learn_sigma=True),
    },
    counted=("LightningDiT-XL/1",),
    counts={
        **{f"LightningDiT-{size}/1": count for size, count in ONE.items()},
        # a patch of 2: the embedding and the output have three more positions of 32 channels
        **{f"LightningDiT-{size}/2": count + 3 * 32 * (2 * WIDTHS[size] + 1) for size, count in ONE.items()},
    },
)
