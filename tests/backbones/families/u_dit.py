"""U-DiT."""

from __future__ import annotations

from ditloom.backbones.u_dit import UDiTConfig
from tests.backbones.portrait import Portrait

TINY = {"width": 48, "heads": 4, "depths": (1, 1, 1, 1, 1), "image_size": 16, "channels": 4}
PORTRAIT = Portrait(
    tiny={
        "u-dit": UDiTConfig(**TINY, classes=10),
        "u-dit-merged": UDiTConfig(**{**TINY, "width": 32}, classes=0, learn_sigma=False, merged=True),
    },
    outputs={"u-dit": 8},
    token_times=False,
    other_size=(16, 24),
    counted=("U-DiT-S", "U-DiT-L-merged"),
    counts={
        "U-DiT-S": 58_896_568,
        "U-DiT-B": 231_251_304,
        "U-DiT-L": 916_335_304,
        "U-DiT-S-merged": 52_045_240,
        "U-DiT-B-merged": 204_425_064,
        "U-DiT-L-merged": 810_188_488,
    },
)
