"""LI-DiT; the shapes of its sizes are chosen so that their counts are the published 1B and 10B."""

from __future__ import annotations

from ditloom.backbones.li_dit import LiDiTConfig
from tests.backbones.portrait import ODD_HEAD, TEXT, Portrait

LI = {**ODD_HEAD, **TEXT, "pooled_width": 20, "table": 12, "table_span": 4}
# queries of the text in MMDiT's last block: computed, normed and dropped
DEAD = frozenset({"blocks.2.text.attn.q_norm.weight"})
PORTRAIT = Portrait(
    tiny={"li-dit": LiDiTConfig(**LI), "li-dit-two": LiDiTConfig(**LI, more_widths=(16,), refiner_depth=1)},
    dead={"li-dit": DEAD, "li-dit-two": DEAD},
    counted=("LI-DiT-1B",),
    counts={"LI-DiT-1B": 996_056_000, "LI-DiT-10B": 10_069_307_968},
)
