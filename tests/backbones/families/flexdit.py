"""FlexDiT: mean blocks lack queries and keys of a DiT's block, recovering ones have two linear layers more."""

from __future__ import annotations

from ditloom.backbones.flexdit import FlexDiTConfig
from tests.backbones.portrait import LATENT, Portrait

SMALL = {**LATENT, "depth": 6, "pooling": 1, "groups": 1, "group": (1, 1, 1, 1), "dense": 1}
LINEAR = 1152**2 + 1152
PORTRAIT = Portrait(
    tiny={
        "flexdit": FlexDiTConfig(**SMALL, sides=(2,), classes=10),
        "flexdit-odd": FlexDiTConfig(
            **{**SMALL, "depth": 4, "group": (0, 1, 1, 0)}, sides=(3,), classes=10, learn_sigma=False
        ),
    },
    outputs={"flexdit": 8},
    identity_start=False,  # pooling and recovering change the grid; tested with the family
    token_times=False,
    counted=("FlexDiT-XL/2", "FlexDiT-XL/2-512"),
    counts={
        "FlexDiT-XL/2": 674_834_720 + (2 * 4 - 2 * 1) * LINEAR,
        "FlexDiT-XL/2-512": 674_834_720 + (2 * 4 - 2 * 2) * LINEAR,
    },
)
