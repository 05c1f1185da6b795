"""MMDiT."""

from __future__ import annotations

from ditloom.backbones.mmdit import MMDiTConfig
from tests.backbones.portrait import ODD_HEAD, TEXT, Portrait

MMDIT = {**ODD_HEAD, **TEXT, "pooled_width": 20, "table": 12, "table_span": 4}
PORTRAIT = Portrait(
    tiny={
        "mmdit": MMDiTConfig(**MMDIT, qk_norm="rms"),
        "mmdit-dual": MMDiTConfig(**{**MMDIT, "depth": 4, "pooled_width": 0}, dual=(0, 1)),
    },
    # queries of the text in the last block: computed, normed and dropped, in the published network as here
    dead={"mmdit": frozenset({"blocks.2.text.attn.q_norm.weight"})},
    counted=("SD3.5-medium",),
    counts={
        "SD3-medium": 2_028_328_000,
        "SD3.5-medium": 2_243_171_520,
        "SD3.5-large": 8_056_627_520,
        "MMDiT-XXS/1": 4_737_808,
        "MMDiT-XS/1": 10_534_544,
        "MMDiT-S/1": 23_351_056,
        "MMDiT-M/1": 62_918_416,
        "MMDiT-XXS/2": 4_750_144,
        "MMDiT-XS/2": 10_553_024,
        "MMDiT-S/2": 23_375_680,
        "MMDiT-M/2": 62_955_328,
    },
)
