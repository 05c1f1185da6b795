"""SANA. Of SANA 1.5 the norms of queries and keys come on top of the same blocks."""

from __future__ import annotations

from ditloom.backbones.sana import SanaConfig
from tests.backbones.portrait import LATENT, TEXT, Portrait

SANA = {**LATENT, **TEXT, "width": 48, "heads": 6, "cross_heads": 3}
PORTRAIT = Portrait(
    tiny={
        "sana": SanaConfig(**SANA),
        "sana-1.5": SanaConfig(**{**SANA, "depth": 2}, qk_norm=True, mlp_ratio=2.0, text_scale=1.0),
    },
    zero_start=False,
    identity_start=False,
    counted=("SANA-0.6B", "SANA-1.5-4.8B"),
    counts={
        "SANA-0.6B": 591_747_872,
        "SANA-1.6B": 1_604_462_752,
        "SANA-1.5-1.6B": 1_604_641_952,
        "SANA-1.5-4.8B": 4_721_825_952,
    },
)
