"""DDT: 674,646,352 is the released XL/2, published as 675M."""

from __future__ import annotations

from ditloom.backbones.ddt import DDTConfig
from tests.backbones.portrait import ODD_HEAD, Portrait

PORTRAIT = Portrait(
    tiny={
        "ddt": DDTConfig(**{**ODD_HEAD, "depth": 2}, head_depth=2, classes=10),
        "ddt-unconditional": DDTConfig(**{**ODD_HEAD, "depth": 1}, head_depth=1, classes=0),
    },
    identity_start=False,
    counted=("DDT-XL/2",),
    counts={"DDT-XL/2": 674_646_352},
)
