"""A feed-forward network with a re-parametrised depthwise convolution (U-DiT, Tian et al., arXiv 2405.02730)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditloom.parts import cost
from ditloom.parts.grids import depthwise, to_map, to_tokens
from ditloom.sites.visit import BARE, BareVisit, Visit

KERNELS = (5, 3, 1)


class Pair(nn.Module):
    """Two linear layers with nothing between them, through `inner` features."""

    def __init__(self, inputs: int, inner: int, outputs: int):
        super().__init__()
        self.first, self.second = nn.Linear(inputs, inner), nn.Linear(inner, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def product(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one linear layer that the two are, in float64."""
        first, second = self.first, self.second
        weight = second.weight.double() @ first.weight.double()
        return weight, second.weight.double() @ first.bias.double() + second.bias.double()


class RepMLP(nn.Module):
    """The training form: linear pair, GELU, h + DW5x5 h + DW3x3 h + DW1x1 h, linear pair.

    Within a pair nothing bends, so each is one matrix; and convolutions add, so the four branches are one 5x5
    convolution: they are added as kernels, which gives the same values and gradients for the cost of one.
    `merged` is the deployed form.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = Pair(width, hidden // 2, hidden)
        self.branches = nn.ModuleList(depthwise(hidden, kernel) for kernel in KERNELS)
        self.fc2 = Pair(hidden, hidden // 2, width)

    def forward(self, x: Tensor, grid: tuple[int, ...], at: Visit | BareVisit = BARE, stream: str = "image") -> Tensor:
        h = to_map(F.gelu(self.fc1(x)), grid)
        weight, bias = self.kernel()
        h = F.conv2d(h, weight, bias, padding=KERNELS[0] // 2, groups=h.shape[1])
        return self.fc2(at.tap("ff_hidden", to_tokens(h), stream))

    def kernel(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Weight [hidden, 1, 5, 5] and bias of the one convolution that identity and branches add up to."""
        branches: list[Any] = list(self.branches)
        weights = [b.weight.to(dtype or b.weight.dtype) for b in branches]
        weights = [F.pad(w, [(KERNELS[0] - w.shape[-1]) // 2] * 4) for w in (*weights, torch.ones_like(weights[-1]))]
        return torch.stack(weights).sum(0), torch.stack([b.bias.to(weights[0].dtype) for b in branches]).sum(0)

    @torch.no_grad()
    def merged(self) -> MergedMLP:
        """The deployed form with the same values: products and sums are taken in float64."""
        weight = self.fc1.first.weight
        out = MergedMLP(weight.shape[1], self.fc1.second.weight.shape[0]).to(weight.device, weight.dtype)
        layers: tuple[Any, ...] = (out.fc1, out.conv, out.fc2)
        values = (self.fc1.product(), self.kernel(torch.float64), self.fc2.product())
        for layer, (weight, bias) in zip(layers, values, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        return out

    def macs(self, tokens: int) -> int:
        return cost.linears(self, tokens) + cost.convolution(self.branches[0], tokens)  # type: ignore[arg-type]


class MergedMLP(nn.Module):
    """The deployed form: linear, GELU, DW5x5, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.conv = depthwise(hidden, KERNELS[0])

    def forward(self, x: Tensor, grid: tuple[int, ...], at: Visit | BareVisit = BARE, stream: str = "image") -> Tensor:
        h = self.conv(to_map(F.gelu(self.fc1(x)), grid))
        return self.fc2(at.tap("ff_hidden", to_tokens(h), stream))

    def macs(self, tokens: int) -> int:
        return cost.linears(self, tokens) + cost.convolution(self.conv, tokens)
