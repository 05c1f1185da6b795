"""DiT-DH: XL is published as 839M."""

from __future__ import annotations

from ditloom.backbones.dit_dh import DiTDHConfig
from tests.backbones.portrait import ODD_HEAD, Portrait

WIDE = {"head_depth": 2, "head_width": 128, "head_heads": 4}
PORTRAIT = Portrait(
    tiny={
        "dit-dh": DiTDHConfig(**{**ODD_HEAD, "depth": 2}, **WIDE, classes=10),
        "dit-dh-equal": DiTDHConfig(**{**ODD_HEAD, "depth": 2}, head_width=96, head_heads=4, head_depth=1, classes=10),
    },
    identity_start=False,  # its first head block turns to the noisy tokens; the others are tested with the family
    counted=("DiT-DH-XL",),
    counts={
        "DiT-DH-S": 196_357_204,
        "DiT-DH-B": 294_099_028,
        "DiT-DH-L": 621_482_036,
        "DiT-DH-XL": 838_380_628,
    },
)
