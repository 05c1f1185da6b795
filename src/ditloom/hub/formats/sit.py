"""State dicts of willisma/SiT: the names and shapes of facebookresearch/DiT, another meaning of time and output."""

from __future__ import annotations

from dataclasses import asdict
from typing import ClassVar

from ditloom.backbones.sit import SiTConfig
from ditloom.contracts.registry import register
from ditloom.contracts.time import REVERSED
from ditloom.hub.format import Foreign
from ditloom.hub.formats.facebook_dit import FacebookDiT


@register("sit", paper="SiT: Scalable Interpolant Transformers, arXiv 2401.08740")
class SiTStateDict(FacebookDiT):
    """SiT-XL-2-256x256.pt and what train.py of that repository writes."""

    family: ClassVar[str] = "sit"

    def config(self, foreign: Foreign) -> SiTConfig:
        return SiTConfig(**{**asdict(super().config(foreign)), "time": REVERSED})
