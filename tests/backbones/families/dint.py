"""DiTs with differential attention: a DiT's count and, per block, 4 d for lambda and 2 d for the head norm."""

from __future__ import annotations

from ditloom.backbones.dint import DintConfig
from tests.backbones.portrait import LATENT, Portrait

DIT = {
    "S": 32_865_056 + 12 * 6 * 64,
    "B": 130_315_808 + 12 * 6 * 64,
    "L": 457_840_672 + 24 * 6 * 64,
    "XL": 674_834_720 + 28 * 6 * 72,
}
PORTRAIT = Portrait(
    tiny={
        "dint": DintConfig(**LATENT, classes=10),
        "dint-diff": DintConfig(**LATENT, classes=10, attention="diff", learn_sigma=False),
    },
    outputs={"dint": 8},
    counted=("DINT-DiT-XL/2", "DIFF-DiT-S/2"),
    counts={f"{kind}-DiT-{size}/2": count for kind in ("DINT", "DIFF") for size, count in DIT.items()},
)
