"""Latte: counts of the official modules built without weights, and of diffusers' for text."""

from __future__ import annotations

from ditloom.backbones.latte import LatteConfig
from tests.backbones.portrait import ODD_HEAD, TEXT, Portrait

LATTE = {**ODD_HEAD, "depth": 4, "frames": 3}
PORTRAIT = Portrait(
    tiny={
        "latte": LatteConfig(**LATTE, classes=10),
        "latte-unconditional": LatteConfig(**{**LATTE, "depth": 2}, learn_sigma=False),
        "latte-text": LatteConfig(**LATTE, **TEXT, interpolation=2.0),
    },
    outputs={"latte": 8, "latte-text": 8},
    restless=frozenset({"latte-text"}),  # its gates start as a random table
    counted=("Latte-XL/2-UCF101", "Latte-1-T2V"),
    other_size=(5, 12, 8),
    counts={
        "Latte-S/2": 32_480_672,
        "Latte-S/4": 32_536_064,
        "Latte-S/8": 32_757_632,
        "Latte-B/2": 129_547_040,
        "Latte-B/4": 129_657_728,
        "Latte-B/8": 130_100_480,
        "Latte-L/2": 456_815_648,
        "Latte-L/4": 456_963_200,
        "Latte-L/8": 457_553_408,
        "Latte-XL/2": 673_681_568,
        "Latte-XL/4": 673_847_552,
        "Latte-XL/8": 674_511_488,
        "Latte-XL/2-UCF101": 673_799_072,
        "Latte-1-T2V": 1_057_246_880,
    },
)
