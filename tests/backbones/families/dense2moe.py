"""Dense2MoE: FLUX's own weights and the routers."""

from __future__ import annotations

from ditloom.backbones.dense2moe import Dense2MoEConfig
from tests.backbones.portrait import ODD_HEAD, TEXT, Portrait

FLUX = {**ODD_HEAD, **TEXT, "depth": 2, "single_depth": 3, "pooled_width": 20, "axes": (4, 8, 12)}
DENSE = 11_901_408_320
PORTRAIT = Portrait(
    tiny={
        "dense2moe": Dense2MoEConfig(**FLUX, experts=4),
        "dense2moe-blocks": Dense2MoEConfig(**{**FLUX, "single_depth": 4}, experts=4, groups=(2,), group=3, active=2),
    },
    counted=("Dense2MoE-FLUX-experts",),
    counts={
        "Dense2MoE-FLUX-experts": DENSE + (2 * 19 + 38) * 12 * 3072,
        "Dense2MoE-FLUX-L": DENSE + (2 * 19 + 38) * 12 * 3072 + 12 * 4 * 3072,
    },
)
