"""DiC."""

from __future__ import annotations

from ditloom.backbones.dic import DiCConfig
from tests.backbones.portrait import Portrait

TINY = {"width": 16, "depths": (2, 4, 1, 4, 2), "image_size": 8, "channels": 4}
PORTRAIT = Portrait(
    tiny={
        "dic": DiCConfig(**TINY, classes=10),
        "dic-unconditional": DiCConfig(**{**TINY, "depths": (1, 1, 2, 1, 1)}, classes=0, learn_sigma=False),
    },
    outputs={"dic": 8},
    identity_start=False,  # gates are not zero at the start
    token_times=False,
    counted=("DiC-S", "DiC-H"),
    counts={
        "DiC-S": 32_835_752,
        "DiC-B": 129_529_160,
        "DiC-XL": 702_266_120,
        "DiC-H": 1_034_516_744,
    },
)
