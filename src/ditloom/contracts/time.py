"""Noise level inside, native time outside: the one place where they are converted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TimeInput:
    """What a network expects as its time: ``native = scale * (1 - t if reversed else t) + offset``.

    `t` in [0, 1] is the noise level (0 data, 1 noise). Conversions run in float64, because in float32
    ``k / 1000 * 1000`` misses ten of the thousand integers.
    """

    scale: float = 1.0
    offset: float = 0.0
    reversed: bool = False

    def native(self, t: Tensor) -> Tensor:
        """Noise level [...] to the network's own time, float64."""
        t = t.to(torch.float64)
        return self.scale * (1 - t if self.reversed else t) + self.offset

    def noise_level(self, native: Tensor) -> Tensor:
        """The network's own time [...] to noise level, float64."""
        level = (native.to(torch.float64) - self.offset) / self.scale
        return 1 - level if self.reversed else level


FLOW = TimeInput()
FLOW_1000 = TimeInput(scale=1000.0)
REVERSED = TimeInput(reversed=True)
DISCRETE_1000 = TimeInput(scale=1000.0, offset=-1.0)
