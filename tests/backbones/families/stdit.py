"""STDiT: counts of the official modules built without weights."""

from __future__ import annotations

from ditloom.backbones.stdit import STDiTConfig
from ditloom.contracts.time import DISCRETE_1000
from tests.backbones.portrait import TEXT, Portrait

STDIT = {"width": 96, "heads": 4, "size": (3, 8, 8), **TEXT}
PORTRAIT = Portrait(
    tiny={
        "stdit": STDiTConfig(version=1, depth=3, space_scale=0.5, time_scale=2.0, time=DISCRETE_1000, **STDIT),
        "stdit-3": STDiTConfig(depth=4, trained=48, **STDIT),
    },
    outputs={"stdit": 8},
    identity_start=False,  # gates start as a random table
    nonzero=frozenset({"stdit-3"}),  # its output layer is not zeroed, as it starts from an image model
    other_size=(5, 12, 8),
    counted=("STDiT-XL/2", "STDiT3-XL/2"),
    counts={"STDiT-XL/2": 759_620_768, "STDiT3-XL/2": 1_207_643_936, "STDiT3-3B/2": 3_182_211_536},
)
