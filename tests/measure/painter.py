"""A stand-in for a model: image i follows from (seed, i, input) alone, and every call is counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from ditloom.measure.evidence import Case, Real


def patch(colour: int, seed: int = 0, size: int = 16) -> np.ndarray:
    """A noisy picture of one of ten colours, uint8 [size, size, 3]."""
    draw = np.random.default_rng([seed, colour])
    base = np.array([25 * colour, 255 - 25 * colour, 10 + 20 * ((colour * 7) % 10)])
    return np.clip(base + draw.integers(-12, 13, (size, size, 3)), 0, 255).astype(np.uint8)


def real(seeds: range, colours: int = 10) -> Real:
    """Every colour once for each seed; groups are odd and even."""
    cases = tuple(Case(c, f"{c}-{seed}", "odd" if c % 2 else "even", c) for seed in seeds for c in range(colours))
    return Real(np.stack([patch(c.label or 0, seed) for seed in seeds for c in cases[:colours]]), cases)


@dataclass
class Painter:
    """Offers what an evaluation asks of a `ditloom.Model`."""

    backbone: nn.Module = field(default_factory=lambda: nn.PReLU(2))
    latents: nn.Module = field(default_factory=nn.Identity)
    conditioner: nn.Module = field(default_factory=nn.Identity)
    info: dict[str, Any] = field(default_factory=lambda: {"name": "painter"})
    drawn: list[int] = field(default_factory=list)
    fail_at: int | None = None

    def settings(self, **given: Any) -> dict[str, Any]:
        defaults = {"sampler": "brush", "steps": 3, "guidance": "none", "size": None, "seed": 0}
        return {**defaults, **{name: value for name, value in given.items() if value is not None}}

    def config(self) -> dict[str, Any]:
        return {"backbone": {"family": "painter"}, "info": self.info}

    def generate(self, inputs: list[int], *, indices: range, seed: int, **_: Any) -> SimpleNamespace:
        if self.fail_at is not None and self.fail_at in indices:
            raise KeyboardInterrupt
        self.drawn += indices
        pairs = zip(inputs, indices, strict=True)
        images = [Image.fromarray(patch(colour, 1000 + 97 * seed + index)) for colour, index in pairs]
        return SimpleNamespace(images=images)
