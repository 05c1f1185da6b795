"""Time, class and pooled-text embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ditloom.contracts.errors import UserError


def sinusoid(time: Tensor, width: int = 256, max_period: float = 10000.0, shift: int = 0) -> Tensor:
    """[...] times to [..., width], float32: cosines first, then sines; frequencies max_period^(-k / (width/2 - shift)).

    `shift` is 0 in every official code base; diffusers' DiT has 1.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=time.device)
    angles = time.to(torch.float32)[..., None] * torch.exp(-math.log(max_period) * steps / (half - shift))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoid of `factor` times the native time, then a two-layer SiLU MLP: [...] -> [..., D].

    The sinusoid is in float32.
    """

    def __init__(
        self, width: int, frequencies: int = 256, max_period: float = 10000.0, shift: int = 0, factor: float = 1.0
    ):
        super().__init__()
        self.frequencies, self.max_period, self.shift, self.factor = frequencies, max_period, shift, factor
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        wave = sinusoid(time * self.factor, self.frequencies, self.max_period, self.shift)
        return self.mlp(wave.to(next(self.mlp.parameters()).dtype))


class LabelEmbedding(nn.Module):
    """A table of class vectors; with `null` one more row, index `classes`, stands for "no class"."""

    def __init__(self, classes: int, width: int, null: bool = True):
        super().__init__()
        self.classes, self.null = classes, null
        self.embedding_table = nn.Embedding(classes + int(null), width)

    def forward(self, label: Tensor) -> Tensor:
        return self.embedding_table(label)

    def check(self, label: Tensor | None) -> Tensor:
        """The labels, or one clear sentence when they are missing or out of range."""
        rows = self.embedding_table.num_embeddings
        if label is None:
            raise UserError(f"this model is conditional on {self.classes} classes: give Condition(label=...)")
        if label.dtype not in (torch.int64, torch.int32):
            raise UserError(f"class labels are whole numbers (int64); got a tensor of {label.dtype}")
        if not torch.compiler.is_compiling() and label.device.type == "cpu" and label.numel():
            low, high = int(label.min()), int(label.max())
            if low < 0 or high >= rows:
                null = f" ({self.classes} means no class)" if self.null else ""
                raise UserError(f"class labels must lie in 0..{rows - 1}{null}; got {low if low < 0 else high}")
        return label


class VectorEmbedding(nn.Module):
    """A pooled vector through a two-layer SiLU MLP: [B, d] -> [B, D]."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, vector: Tensor) -> Tensor:
        return self.mlp(vector.to(next(self.mlp.parameters()).dtype))


class TextEmbedding(nn.Module):
    """Token states through a two-layer GELU (tanh approximation) MLP: [B, n, inputs] -> [B, n, D]."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, width), nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(text), approximate="tanh"))


def time_mlp(width: int) -> nn.Sequential:
    """linear -> SiLU -> linear through four times the width, for a sinusoid [..., D] that becomes a token."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
