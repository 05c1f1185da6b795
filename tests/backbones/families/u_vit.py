"""U-ViT: counts of the paper's table (44M, 131M, 287M, 501M; deep 58M in the text)."""

from __future__ import annotations

from ditloom.backbones.u_vit import UViTConfig
from tests.backbones.portrait import LATENT, TEXT, Portrait

PORTRAIT = Portrait(
    tiny={
        "u-vit": UViTConfig(**{**LATENT, "depth": 4}, classes=10),
        "u-vit-text": UViTConfig(**{**LATENT, "depth": 2}, **TEXT, time_mlp=True, convolution=False),
    },
    zero_start=False,
    identity_start=False,
    token_times=False,
    other_size=None,
    counted=("U-ViT-H/2", "U-ViT-2.3B/2-T2I"),
    counts={
        "U-ViT-S/2": 44_772_516,
        "U-ViT-M/2": 130_891_940,
        "U-ViT-L/2": 286_763_172,
        "U-ViT-H/2": 500_832_016,
        "U-ViT-L/4": 286_861_524,
        "U-ViT-H/4": 500_942_656,
        "U-ViT-S/2-T2I": 44_692_644,
        "U-ViT-S-deep/2-T2I": 58_345_636,
        "U-ViT-0.5B/2-T2I": 505_371_044,
        "U-ViT-1.6B/2-T2I": 1_588_400_292,
        "U-ViT-2.3B/2-T2I": 2_352_064_676,
    },
)
