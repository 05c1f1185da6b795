"""Sparse experts: every token runs through the k experts that its router prefers (DiT-MoE, HiDream-I1, Dense2MoE).

Tokens are sorted by expert and each expert sees its own as one matrix: nothing is dropped, nothing padded, and no
expert runs over tokens that are not its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditloom.contracts.errors import UserError
from ditloom.parts.grouped import grouped_linear
from ditloom.sites.visit import BARE, BareVisit, Visit

BALANCE = "balance"


class Router(nn.Module):
    """softmax(W x) over the experts, and the k largest of it, which are not normalised again.

    Computed in float32 whatever the model's dtype, equal scores in the order of the experts, so that a token chooses
    the same alone and in a batch.
    """

    def __init__(self, width: int, experts: int, top_k: int):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise UserError(f"{top_k} experts per token cannot be chosen among {experts}")
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(experts, width))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] to probabilities [..., E], and of the chosen experts the gates and numbers [..., k]."""
        probabilities = F.linear(x.to(torch.float32), self.weight.to(torch.float32)).softmax(dim=-1)
        gates, chosen = probabilities.sort(dim=-1, descending=True, stable=True)
        return probabilities, gates[..., : self.top_k], chosen[..., : self.top_k]

    def macs(self, tokens: int) -> int:
        return self.weight.numel() * tokens


class SwiGLUExperts(nn.Module):
    """E feed-forwards w3(silu(w1 x) * w2 x) without biases; w1 and w2 stand one above the other."""

    def __init__(self, experts: int, width: int, hidden: int):
        super().__init__()
        self.w12 = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.w3 = nn.Parameter(torch.empty(experts, width, hidden))
        with torch.no_grad():
            for matrix in (m for e in range(experts) for m in (*self.w12[e].chunk(2), self.w3[e])):
                nn.init.xavier_uniform_(matrix)

    def forward(self, x: Tensor, numbers: Tensor, ends: Tensor) -> Tensor:
        """x [n, D] sorted by expert, of which `numbers` [n] are the experts and `ends` [E] the ends of the groups."""
        gate, value = grouped_linear(x, self.w12, ends).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * value, self.w3, ends)

    def macs(self, tokens: int) -> int:
        return (self.w12[0].numel() + self.w3[0].numel()) * tokens


class GELUExperts(nn.Module):
    """E feed-forwards fc2(gelu(fc1 x + b)), tanh-approximated; a bias at the end is left to whoever adds them up."""

    def __init__(self, experts: int, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Parameter(torch.empty(experts, hidden, width))
        self.bias = nn.Parameter(torch.zeros(experts, hidden))
        self.fc2 = nn.Parameter(torch.empty(experts, width, hidden))
        with torch.no_grad():
            for matrix in (m for e in range(experts) for m in (self.fc1[e], self.fc2[e])):
                nn.init.xavier_uniform_(matrix)

    def forward(self, x: Tensor, numbers: Tensor, ends: Tensor) -> Tensor:
        """As of `SwiGLUExperts`."""
        hidden = F.gelu(grouped_linear(x, self.fc1, ends) + self.bias[numbers], approximate="tanh")
        return grouped_linear(hidden, self.fc2, ends)

    def macs(self, tokens: int) -> int:
        return (self.fc1[0].numel() + self.fc2[0].numel()) * tokens


class MoE(nn.Module):
    """y = scale * sum_k g_k E_k(x) + S(x): the chosen experts by their gates, and a shared expert that every token has.

    A block plan that keeps "balance" is handed what a balance loss is made of, see `balance_loss`. `shared` is a
    feed-forward part; its hidden layer is the stage ff_hidden.
    """

    def __init__(self, router: Router, experts: SwiGLUExperts | GELUExperts, shared: Any, scale: float = 1.0):
        super().__init__()
        self.router, self.experts, self.shared, self.scale = router, experts, shared, scale

    def forward(self, x: Tensor, at: Visit | BareVisit = BARE, stream: str = "image") -> Tensor:
        probabilities, gates, chosen = self.router(x)
        if at.wants(BALANCE):
            at.keep(BALANCE, torch.stack([shares(chosen, probabilities.shape[-1]), probabilities.mean(1)], dim=1))
        return self.routed(x, gates * self.scale, chosen) + self.shared(x, at, stream)

    def routed(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """x [B, n, D] through the chosen experts [B, n, k], added up by their gates [B, n, k]."""
        numbers, order = chosen.flatten().sort(stable=True)
        experts = torch.arange(self.router.weight.shape[0], device=x.device)
        ends = torch.searchsorted(numbers, experts, right=True).to(torch.int32)
        tokens = order.div(chosen.shape[-1], rounding_mode="floor")
        y = self.experts(x.flatten(0, 1)[tokens], numbers, ends)
        y = y[order.argsort()].unflatten(0, chosen.shape)
        return (y * gates[..., None].to(y.dtype)).sum(dim=-2)

    def macs(self, tokens: int) -> int:
        """Of the experts that a token really runs through."""
        routed = self.router.top_k * self.experts.macs(tokens)
        return int(self.router.macs(tokens) + routed + self.shared.macs(tokens))


def shares(chosen: Tensor, experts: int) -> Tensor:
    """The share of each expert in all choices of a row: [B, n, k] to [B, E], float32."""
    return F.one_hot(chosen.flatten(1), experts).to(torch.float32).mean(1)


def balance_loss(kept: Tensor) -> Tensor:
    """E sum_i f_i P_i over a batch, from what a block keeps as "balance" [B, 2, E]; 1 where routing is uniform.

    f_i is the share of choices that fall on expert i, P_i its mean probability. DiT-MoE and HiDream-I1 add 0.01 times
    this to the training loss, DiT-MoE of every layer.
    """
    f, p = kept.mean(0)
    return kept.shape[-1] * (f * p).sum()
