"""Routers that switch parts of a block on and off, and the masks they make (DyDiT, Zhao et al., arXiv 2410.03456)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditloom.contracts.errors import UserError

TEMPERATURE = 5.0
OPEN, OPEN_TOKENS = 15.0, 35.0
"""Biases at the start: everything is on."""


def mask_of(logits: Tensor, noise: Tensor | None = None) -> Tensor:
    """0 or 1 where the (noisy) sigmoid is at most or above a half; gradients are those of the sigmoid.

    noise: the difference of two Gumbel draws in training (logits and noise are divided by the temperature, 5), None
    otherwise. The result is exactly 0 or 1.
    """
    soft = torch.sigmoid(logits if noise is None else (logits + noise.to(logits)) / TEMPERATURE)
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())


def gumbel_difference(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """The difference of two Gumbel draws, which is logistic: log u - log(1 - u)."""
    u = torch.rand(shape, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return torch.logit(u).to(torch.float32)


class WidthRouter(nn.Module):
    """Which of `groups` equal parts of a width are on, from the time embedding [B, D]: [B, 1, groups].

    The first part is always on: it has no logit.
    """

    def __init__(self, width: int, groups: int):
        super().__init__()
        if groups < 2:
            raise UserError(f"a width router chooses among at least 2 groups; got {groups}")
        self.linear = nn.Linear(width, groups - 1)

    def forward(self, time: Tensor, noise: Tensor | None = None) -> Tensor:
        chosen = mask_of(self.linear(time), noise)
        return torch.cat([torch.ones_like(chosen[:, :1]), chosen], dim=1)[:, None]

    def open_(self) -> None:
        """All on, as at the start of training."""
        nn.init.constant_(self.linear.bias, OPEN)


class TokenRouter(nn.Module):
    """Which tokens are on, from their features x [B, N, D]: [B, N, 1]."""

    def __init__(self, width: int, reduction: int = 16):
        super().__init__()
        if width < reduction:
            raise UserError(f"a token router needs a width of at least {reduction}; got {width}")
        hidden = width // reduction
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return mask_of(self.mlp(x), None if noise is None else noise[..., None])

    def open_(self) -> None:
        """All on, as at the start of training."""
        last = self.mlp[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias, OPEN_TOKENS)


def cost_ratio(parts: list[tuple[float, Tensor]]) -> Tensor:
    """The executed share of a cost per row [B]: (full cost, mean of its masks [B]) of every part."""
    full = sum(cost for cost, _ in parts)
    return torch.stack([cost * share for cost, share in parts]).sum(0) / full


def cost_loss(ratio: Tensor, target: float) -> Tensor:
    """(mean over the batch of the executed share - target)^2; the paper's weight for it is 2."""
    return (ratio.mean() - target).square()
