"""SiT: Scalable Interpolant Transformers (Ma et al., ECCV 2024, arXiv 2401.08740)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from ditloom.backbones import dit
from ditloom.backbones.dit import DiT, DiTConfig
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Streams
from ditloom.contracts.time import REVERSED, TimeInput


@dataclass(frozen=True, kw_only=True)
class SiTConfig(DiTConfig):
    """Settings of a SiT: those of a DiT. Its own time is 1 at the data and goes to the sinusoid unscaled.

    Released weights predict the velocity towards the data, x0 - noise. `sign` turns it into the process's velocity,
    dx/dt in noise-level time, which is noise - x0; the head applies it.
    """

    family: ClassVar[str] = "sit"
    process: ClassVar[Mapping[str, Any]] = {"name": "linear", "predicts": "v"}
    sign: ClassVar[int] = -1

    time: TimeInput = REVERSED

    def build(self) -> SiT:
        return SiT(self)


@register("sit", paper="SiT: Scalable Interpolant Transformers, arXiv 2401.08740")
class SiT(DiT):
    """The network of DiT with the same weights by name; of its 2C outputs the second half is dropped.

    x [B, C, H, W]; prediction [B, C, H, W], the velocity dx/dt: minus what the official network returns.
    """

    missing: ClassVar[Mapping[str, str]] = {kind: reason.replace("DiT", "SiT") for kind, reason in DiT.missing.items()}

    def head(self, streams: Streams, context: Context) -> Tensor:
        return self.preset.sign * super().head(streams, context)[:, : self.preset.channels]


def _from_dit(config: DiTConfig) -> SiTConfig:
    return SiTConfig(**{**asdict(config), "time": REVERSED})


PRESETS = {name.replace("DiT", "SiT"): _from_dit(config) for name, config in dit.PRESETS.items()}
