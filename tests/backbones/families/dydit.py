"""DyDiT: a DiT's count and, per block, two width routers and a token router."""

from __future__ import annotations

from ditloom.backbones.dydit import DyDiTConfig
from tests.backbones.portrait import LATENT, Portrait


def _routers(depth: int, width: int, heads: int) -> int:
    return depth * (2 * (width + 1) * (heads - 1) + (width + 1) * (width // 16) + width // 16 + 1)


PORTRAIT = Portrait(
    tiny={
        "dydit": DyDiTConfig(**LATENT, classes=10),
        "dydit-narrow-heads": DyDiTConfig(**{**LATENT, "heads": 8}, classes=10, learn_sigma=False),
    },
    outputs={"dydit": 8},
    token_times=False,
    counted=("DyDiT-XL/2",),
    counts={
        "DyDiT-S/2": 32_865_056 + _routers(12, 384, 6),
        "DyDiT-B/2": 130_315_808 + _routers(12, 768, 12),
        "DyDiT-L/2": 457_840_672 + _routers(24, 1024, 16),
        "DyDiT-XL/2": 674_834_720 + _routers(28, 1152, 16),
    },
)
