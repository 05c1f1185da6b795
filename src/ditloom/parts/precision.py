"""Where sums need more digits than the tensors they are of."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
