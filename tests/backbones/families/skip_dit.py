"""Skip-DiT: 712,074,272 is the released XL/2; the other sizes are a DiT's count and 2 D^2 + 5 D per pair of blocks."""

from __future__ import annotations

from ditloom.backbones.skip_dit import SkipDiTConfig
from tests.backbones.portrait import LATENT, Portrait

PORTRAIT = Portrait(
    tiny={
        "skip-dit": SkipDiTConfig(**{**LATENT, "depth": 4}, classes=10),
        "skip-dit-residual": SkipDiTConfig(**{**LATENT, "depth": 4}, classes=10, residual=True, learn_sigma=False),
    },
    outputs={"skip-dit": 8},
    restless=frozenset({"skip-dit"}),  # its merges start at random; those of the residual form change nothing
    counted=("Skip-DiT-XL/2",),
    counts={
        "Skip-DiT-S/2": 32_865_056 + 6 * (2 * 384**2 + 5 * 384),
        "Skip-DiT-B/2": 130_315_808 + 6 * (2 * 768**2 + 5 * 768),
        "Skip-DiT-L/2": 457_840_672 + 12 * (2 * 1024**2 + 5 * 1024),
        "Skip-DiT-XL/2": 712_074_272,
    },
)
