"""HiDream."""

from __future__ import annotations

from ditloom.backbones.hidream import HiDreamConfig
from tests.backbones.portrait import ODD_HEAD, TEXT, Portrait

HIDREAM = {
    **ODD_HEAD,
    **TEXT,
    "depth": 2,
    "single_depth": 3,
    "pooled_width": 20,
    "axes": (12, 4, 8),
    "llama_width": 16,
    "llama_tokens": 5,
    "layers": (0, 1, 3, 2, 3),
}
PORTRAIT = Portrait(
    tiny={"hidream": HiDreamConfig(**HIDREAM)},
    counted=("HiDream-I1",),
    counts={"HiDream-I1": 17_105_733_184},
)
