"""Mamba mixers: a gated selective scan over tokens, in one or both directions (Gu & Dao, arXiv 2312.00752)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditloom.parts import cost
from ditloom.parts.precision import wide
from ditloom.parts.selective_scan import scan_macs, selective_scan
from ditloom.sites.visit import BARE, BareVisit, Visit

STAGES = ("in_proj", "scanned")
TAPS = 4
DT_RANGE = (1e-3, 0.1)
DT_FLOOR = 1e-4


class Direction(nn.Module):
    """Causal depthwise convolution, SiLU, and the selective scan with its input-dependent dt, B and C.

    x [B, L, E] to y + D x; A = -exp(A_log) starts at -1, ..., -N in every channel, dt between 0.001 and 0.1.
    """

    def __init__(self, width: int, rank: int, states: int = 16):
        super().__init__()
        self.rank, self.states = rank, states
        self.conv = nn.Conv1d(width, width, TAPS, groups=width)
        self.x_proj = nn.Linear(width, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, width)
        self.A_log = nn.Parameter(torch.arange(1, states + 1, dtype=torch.float32).log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))

    def initialise(self) -> None:
        """As published: dt_proj uniform in rank^-1/2, its bias so that softplus gives dt log-uniform in its range."""
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        low, high = (math.log(bound) for bound in DT_RANGE)
        dt = (torch.rand_like(self.dt_proj.bias) * (high - low) + low).exp().clamp(min=DT_FLOOR)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """x [B, L, E] to [B, L, E]; `before` [B, E] stands where the convolution looks before the first token."""
        x = x.transpose(1, 2)
        x = F.pad(x, (TAPS - 1, 0)) if before is None else torch.cat([before[..., None].expand(-1, -1, TAPS - 1), x], 2)
        x = F.silu(self.conv(x).transpose(1, 2))
        dt, B, C = self.x_proj(x).split([self.rank, self.states, self.states], dim=-1)
        dt = F.softplus(wide(F.linear(dt, self.dt_proj.weight)) + wide(self.dt_proj.bias))
        return selective_scan(x, dt, -torch.exp(wide(self.A_log)), B, C) + self.D * x

    def macs(self, tokens: int) -> int:
        channels = self.conv.in_channels
        return cost.linears(self, tokens) + TAPS * channels * tokens + scan_macs(tokens, channels, self.states)


class Mamba(nn.Module):
    """out_proj(scan(x) SiLU(z)), (x, z) = in_proj(h); `both`: plus the reversed scan of the reversed tokens.

    The two directions share in_proj and out_proj and nothing else (the "v2" of Vision Mamba). Inner width 2D, 16
    states, rank of dt ceil(D / 16).
    """

    def __init__(self, width: int, both: bool = True, expand: int = 2, states: int = 16):
        super().__init__()
        inner, rank = expand * width, math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.ahead = Direction(inner, rank, states)
        self.back = Direction(inner, rank, states) if both else None
        self.out_proj = nn.Linear(inner, width, bias=False)

    def initialise(self, layers: int) -> None:
        """As published: weights as torch has them, out_proj over sqrt(layers)."""
        for direction in (self.ahead, self.back):
            if direction is not None:
                direction.initialise()
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(layers)

    def forward(self, h: Tensor, at: Visit | BareVisit = BARE, before: Tensor | None = None) -> Tensor:
        x, z = at.tap("in_proj", self.in_proj(h)).chunk(2, dim=-1)
        y = self.ahead(x, before)
        if self.back is not None:
            y = y + self.back(x.flip(1), before).flip(1)
        return self.out_proj(at.tap("scanned", y * F.silu(z)))

    def macs(self, tokens: int) -> int:
        directions = sum(d.macs(tokens) for d in (self.ahead, self.back) if d is not None)
        return directions + cost.linear(self.in_proj, tokens) + cost.linear(self.out_proj, tokens)
