"""DiS. The paper counts unconditional models (28.4M to 900.6M): labels and the head's modulation come on top."""

from __future__ import annotations

from ditloom.backbones.dis import DiSConfig
from tests.backbones.portrait import Portrait

TINY = {"depth": 4, "width": 40, "patch": 2, "image_size": 8, "channels": 4, "states": 4}
PORTRAIT = Portrait(
    tiny={
        "dis": DiSConfig(**TINY, classes=10),
        "dis-unconditional": DiSConfig(**{**TINY, "depth": 2}, classes=0, learn_sigma=False),
    },
    outputs={"dis": 8},
    zero_start=False,
    identity_start=False,
    token_times=False,
    other_size=None,
    counted=("DiS-S/2", "DiS-H/4"),
    counts={
        "DiS-S/2": 29_132_752,
        "DiS-B/2": 121_163_552,
        "DiS-M/2": 231_414_560,
        "DiS-L/2": 407_249_952,
        "DiS-H/2": 906_966_560,
        "DiS-S/4": 29_115_184,
        "DiS-B/4": 121_126_784,
        "DiS-M/4": 231_377_792,
        "DiS-L/4": 407_200_896,
        "DiS-H/4": 906_892_928,
    },
)
