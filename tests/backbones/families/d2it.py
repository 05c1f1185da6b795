"""D2iT: L and XL are published as 467M and 687M; the counts here are the reconstruction's, 0.6 % off at most."""

from __future__ import annotations

from ditloom.backbones.d2it import D2iTConfig
from tests.backbones.portrait import LATENT, Portrait

REFINE = {"refine_width": 32, "refine_heads": 2}
PORTRAIT = Portrait(
    tiny={
        "d2it": D2iTConfig(**{**LATENT, "depth": 2}, **REFINE, classes=10),
        "d2it-unconditional": D2iTConfig(
            **{**LATENT, "depth": 2}, **REFINE, classes=0, learn_sigma=False, fine_ratio=0.25, refine_depth=1
        ),
    },
    outputs={"d2it": 8},
    token_times=False,
    other_size=None,
    counted=("D2iT-XL/2",),
    counts={"D2iT-B/2": 137_099_920, "D2iT-L/2": 469_638_672, "D2iT-XL/2": 689_655_760},
)
