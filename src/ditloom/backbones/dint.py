"""DiTs with differential attention: DINT Transformer (arXiv 2501.17486), Differential Transformer (arXiv 2410.05258).

Both papers train language models; the sizes here are those of DiT, in which attention is bidirectional.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ditloom.backbones import dit
from ditloom.backbones.dit import DiT, DiTConfig
from ditloom.contracts.registry import register


@dataclass(frozen=True, kw_only=True)
class DintConfig(DiTConfig):
    """Settings of a DiT whose attention is "dint" or "diff"; `heads` counts query heads, an even number."""

    family: ClassVar[str] = "dint"

    attention: str = "dint"

    def build(self) -> Dint:
        return Dint(self)


@register("dint", paper="DINT Transformer, arXiv 2501.17486; Differential Transformer, arXiv 2410.05258")
class Dint(DiT):
    """DiT with the difference of two softmax maps in place of one.

    x [B, C, H, W] with H, W multiples of the patch; prediction [B, C or 2C, H, W].
    """

    missing: ClassVar[Mapping[str, str]] = {
        **{kind: why.replace("DiT", "this DiT") for kind, why in DiT.missing.items()},
        "logits": "differential attention has two maps with negative weight between them, and no logits of one",
    }
    preset: DintConfig


PRESETS = {
    f"{kind.upper()}-DiT-{size}/2": DintConfig(depth=depth, width=width, heads=heads, attention=kind)
    for kind in ("dint", "diff")
    for size, (depth, width, heads) in dit.SIZES.items()
}
