"""DiMSUM."""

from __future__ import annotations

from ditloom.backbones.dimsum import DiMSUMConfig
from tests.backbones.portrait import Portrait

TINY = {
    "depth": 4,
    "width": 48,
    "heads": 4,
    "fusion_heads": 2,
    "every": 2,
    "image_size": 16,
    "channels": 4,
    "states": 4,
}
DEAD = frozenset(
    f"blocks.{i}.{scan}.before.{p}"
    for i in (0, 1, 3, 4)
    for scan in ("spatial", "frequency")
    for p in ("weight", "bias")
)
PORTRAIT = Portrait(
    tiny={
        "dimsum": DiMSUMConfig(**TINY, classes=10),
        "dimsum-state": DiMSUMConfig(**{**TINY, "depth": 2}, classes=0, initial_state=True),
    },
    dead={"dimsum": DEAD},  # as released: the kernel overwrites what these project to
    unread={"dimsum": DEAD},
    identity_start=False,
    token_times=False,
    other_size=None,
    counted=("DiMSUM-L/2",),
    counts={
        "DiMSUM-B/2": 198_547_216,
        "DiMSUM-L/2": 459_916_304,
        "DiMSUM-XL/2": 854_831_248,
    },
)
