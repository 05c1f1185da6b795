"""What is stored of a guidance branch: its difference from the conditional one, split by frequency (FasterCache)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.clock import Schedule
from ditloom.contracts.errors import UserError


@dataclass(frozen=True)
class BandGap:
    """z = {"low", "high"}: the parts of y - x inside and outside a disc of low frequencies; y = x + low + high.

    The transform is linear, so that this is FasterCache's rule on two spectra, done once where the gap is computed
    and kept as real images. The disc has the radius ``min(H, W) // radius`` around frequency 0; in float32.
    """

    radius: int = 5

    def encode(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if x.ndim < 4:
            raise UserError(f"frequencies of a prediction need a height and a width; this one is {list(x.shape)}")
        gap = y.float() - x.float()
        low = torch.fft.ifft2(torch.fft.fft2(gap) * disc(*gap.shape[-2:], self.radius).to(gap.device)).real
        return {"low": low, "high": gap - low}

    def decode(self, x: Tensor, z: dict[str, Tensor]) -> Tensor:
        return (x.float() + z["low"] + z["high"]).to(x.dtype)


@lru_cache(maxsize=64)
def disc(height: int, width: int, radius: int) -> Tensor:
    """True at the frequencies [H, W] (0 first) closer to 0 than ``min(H, W) // radius``, its border included."""
    y, x = (torch.fft.fftfreq(n, 1 / n) for n in (height, width))
    return y[:, None].square() + x[None].square() <= (min(height, width) // radius) ** 2


@dataclass(frozen=True)
class BandScale:
    """The newest gap, its bands grown with every step predicted since: low ones early in a run, high ones late.

    low, high: the factor of a step; switch: the share of the steps at which the low band's growth gives way to the
    high band's. steps: of the run; `on` fills it in.
    """

    low: float = 1.1
    high: float = 1.1
    switch: float = 0.9
    steps: int = 0
    depth: int = 1

    def on(self, schedule: Schedule) -> BandScale:
        """In a run of so many steps."""
        return replace(self, steps=schedule.steps)

    def __call__(self, history: Sequence[tuple[int, Any]], step: int) -> dict[str, Tensor]:
        computed, z = history[-1]
        late = sum(s >= int(self.switch * self.steps) for s in range(computed + 1, step + 1))
        early = step - computed - late
        return {"low": z["low"] * self.low**early, "high": z["high"] * self.high**late}
