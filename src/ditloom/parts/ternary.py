"""Linear layers of weights -1, 0 and 1 times a learned scale, in training (TerDiT, arXiv 2405.14854)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditloom.contracts.errors import UserError
from ditloom.parts.modulation import AdaLN
from ditloom.parts.norms import RMSNorm


def ternary(weight: Tensor) -> Tensor:
    """clamp(round(W / mean|W|), -1, 1) of a matrix; the gradient with respect to W is that of the result.

    Ratios are taken in float32; the result is exactly -1, 0 or 1.
    """
    ratio = weight.detach().to(torch.float32)
    ratio = ratio / (ratio.abs().mean() + 1e-6)
    return ratio.round().clamp(-1, 1).to(weight.dtype) + (weight - weight.detach())


class TernaryLinear(nn.Linear):
    """x (alpha T)^T + bias with T the ternary form of the latent weight; activations keep their precision.

    parts: equally tall matrices that stand one above the other, each with a mean and a scale alpha of its own.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, parts: int = 1):
        if out_features % parts:
            raise UserError(f"{out_features} outputs are not {parts} equal parts")
        super().__init__(in_features, out_features, bias)
        self.parts = parts
        self.alphas = nn.Parameter(torch.ones(parts))
        self.initialise()

    def initialise(self) -> None:
        """Xavier-uniform for every part, alpha at its mean size (the release draws alpha from N(0, 1)), zero bias."""
        with torch.no_grad():
            for number, part in enumerate(self.weight.chunk(self.parts)):
                nn.init.xavier_uniform_(part)
                self.alphas[number] = part.abs().mean()
            if self.bias is not None:
                self.bias.zero_()

    def deployed(self) -> Tensor:
        """alpha T: what the layer multiplies by."""
        scaled = [a * ternary(part) for a, part in zip(self.alphas, self.weight.chunk(self.parts), strict=True)]
        return scaled[0] if len(scaled) == 1 else torch.cat(scaled)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.deployed(), self.bias)


class NormedAdaLN(AdaLN):
    """chunks of RMSNorm(linear(SiLU(c))): the norm keeps the modulation at its weight's size, whatever the linear.

    With a zero linear it is zero; near zero its gradient is up to 1 / sqrt(eps) times as large: warm up the rate.
    """

    def __init__(self, width: int, chunks: int, inputs: int, linear: nn.Linear, eps: float = 1e-5):
        super().__init__(width, chunks, inputs)
        self.linear = linear
        self.norm = RMSNorm(chunks * width, eps)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.norm(self.linear(F.silu(c))).chunk(self.chunks, dim=-1)

    def initialise(self) -> None:
        """A zero modulation that learns: zero weight and bias, while scales and the norm's weight are not zero."""
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.zero_()
            self.norm.weight.fill_(1)
