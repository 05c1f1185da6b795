"""Wan 2.1: counts of diffusers' module with the published settings."""

from __future__ import annotations

from ditloom.backbones.wan import WanConfig
from tests.backbones.portrait import TEXT, Portrait

WAN = {"depth": 3, "width": 80, "heads": 4, "hidden": 96, "channels": 4, **TEXT}
PORTRAIT = Portrait(
    tiny={
        "wan": WanConfig(**WAN, size=(2, 8, 8)),  # heads of 20 features: 8, 6 and 6 of them turned by three axes
        "wan-image": WanConfig(**WAN, size=(2, 8, 8), image_width=20, image_tokens=5, given=3),
        "wan-thick": WanConfig(**{**WAN, "depth": 2}, size=(4, 4, 8), patch=(2, 2, 2)),
    },
    identity_start=False,  # gates start as a random table
    other_size=(4, 12, 8),
    counted=("Wan2.1-T2V-1.3B", "Wan2.1-I2V-14B-480P"),
    counts={
        "Wan2.1-T2V-1.3B": 1_418_996_800,
        "Wan2.1-T2V-14B": 14_288_491_584,
        "Wan2.1-I2V-14B-480P": 16_394_878_784,
        "Wan2.1-I2V-14B-720P": 16_394_878_784,
    },
)
