"""DiT-MoE. The sheet's counts are without the norms of queries and keys, which XL and G have: 4 d per block more."""

from __future__ import annotations

from ditloom.backbones.dit_moe import DiTMoEConfig
from ditloom.contracts.time import FLOW
from tests.backbones.portrait import LATENT, Portrait

MOE = {**LATENT, "classes": 10, "experts": 4}
PORTRAIT = Portrait(
    tiny={
        "dit-moe": DiTMoEConfig(**MOE),
        "dit-moe-flow": DiTMoEConfig(**MOE, top_k=1, qk_norm=True, flow=True, time=FLOW),
    },
    outputs={"dit-moe": 8},
    counted=("DiT-MoE-S/2-8E2A", "DiT-MoE-XL/2-8E2A"),
    counts={
        "DiT-MoE-S/2-8E2A": 199_209_248,
        "DiT-MoE-S/2-16E2A": 369_115_424,
        "DiT-MoE-B/2-8E2A": 795_664_928,
        "DiT-MoE-XL/2-8E2A": 4_167_869_216 + 28 * 4 * 72,
        "DiT-MoE-G/2-16E2A": 16_503_356_704 + 40 * 4 * 88,
    },
)
