"""Moving noise levels towards noise or data: ``t' = s t / (1 + (s - 1) t)``.

On the linear path a shift s adds log s to log(sigma / alpha). Published values (noise-level time): SD3 3, Sana 3,
Wan 3 to 5, HunyuanVideo 7; LightningDiT's 0.3 in data time is 1 / 0.3 here.
"""

from __future__ import annotations

import math
from typing import Any

from ditloom.contracts.settings import positive


def shift(t: Any, amount: float) -> Any:
    """Shifted noise level (Esser et al. 2024, eq. 23); amount > 1 moves towards noise, 1 / amount undoes it."""
    if amount == 1:
        return t
    positive(shift=amount)
    return amount * t / (1 + (amount - 1) * t)


def resolution_shift(tokens: int, low: tuple[int, float] = (256, 0.5), high: tuple[int, float] = (4096, 1.15)) -> float:
    """FLUX's dynamic shift ``exp(mu)``, mu linear in the number of image tokens."""
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return math.exp(low[1] + slope * (tokens - low[0]))


def dimension_shift(dimension: int, base: int = 4096) -> float:
    """The shift for a latent of `dimension` values, ``sqrt(dimension / base)`` (RAE)."""
    return math.sqrt(dimension / base)
