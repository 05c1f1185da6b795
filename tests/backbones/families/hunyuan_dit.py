"""Hunyuan-DiT."""

from __future__ import annotations

from ditloom.backbones.hunyuan_dit import HunyuanDiTConfig
from tests.backbones.portrait import ODD_HEAD, TEXT, Portrait

HUNYUAN = {
    **ODD_HEAD,
    **TEXT,
    "depth": 6,
    "t5_width": 16,
    "t5_tokens": 5,
    "pooled": 24,
    "pool_heads": 2,
    "base": 6,
}
PORTRAIT = Portrait(
    tiny={
        "hunyuan-dit": HunyuanDiTConfig(**HUNYUAN),
        "hunyuan-dit-sized": HunyuanDiTConfig(
            **{**HUNYUAN, "depth": 4, "base": None}, sized=True, learn_sigma=False, mlp_ratio=4.3637
        ),
    },
    outputs={"hunyuan-dit": 8},
    identity_start=False,  # no gates
    counted=("HunyuanDiT-g/2-v1.1", "HunyuanDiT-g/2-v1.2"),
    counts={"HunyuanDiT-g/2-v1.1": 1_516_534_048, "HunyuanDiT-g/2-v1.2": 1_499_952_032},
)
