"""Tiny backbones for the mechanism's tests: every zero tensor re-randomised, so that nothing passes trivially."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditloom.backbones.dit import DiT, DiTBlock, DiTConfig
from ditloom.backbones.mmdit import MMDiTConfig
from ditloom.backbones.u_vit import UViTConfig
from ditloom.contracts.backbone import NOTHING, Backbone, Transition
from ditloom.contracts.clock import Schedule
from ditloom.contracts.condition import Condition
from ditloom.contracts.layout import Layout, Span
from ditloom.contracts.streams import Context, Streams
from ditloom.parts.patches import unpatchify

SIZE, CHANNELS = 8, 4


@dataclass(frozen=True, kw_only=True)
class UToyConfig(DiTConfig):
    """A U-shape of DiT blocks: two at full size, two on pooled tokens, two at full size again."""

    family: ClassVar[str] = "u-toy"

    def build(self) -> UToy:
        return UToy(self)


class Pool(Transition):
    """2x2 mean over the token grid."""

    def after(self, layout: Layout) -> Layout:
        h, w = layout.grid
        return Layout((Span("image", h * w // 4),), (h // 2, w // 2))

    def forward(
        self, streams: Streams, context: Context, plan: Any = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        h, w = streams.layout.grid
        x = streams["image"].unflatten(1, (h // 2, 2, w // 2, 2)).mean((2, 4)).flatten(1, 2)
        return Streams({"image": x}, self.after(streams.layout)), {}


class Upsample(Transition):
    """Nearest 2x upsampling of the token grid, plus the skip."""

    def after(self, layout: Layout) -> Layout:
        h, w = layout.grid
        return Layout((Span("image", 4 * h * w),), (2 * h, 2 * w))

    def forward(
        self, streams: Streams, context: Context, plan: Any = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        h, w = streams.layout.grid
        x = streams["image"].unflatten(1, (h, 1, w, 1)).expand(-1, h, 2, w, 2, -1).flatten(1, 4)
        return Streams({"image": x + given["skip"]["image"]}, self.after(streams.layout)), {}


class UToy(DiT):
    """Flat list: block, block, pool, block, block, upsample (skip from block 1), block, block."""

    skips: ClassVar[Mapping[int, int]] = {5: 1}

    def __init__(self, config: UToyConfig):
        super().__init__(config)
        blocks = list(self.blocks)
        self.blocks = nn.ModuleList([*blocks[:2], Pool(), *blocks[2:4], Upsample(), *blocks[4:]])

    def head(self, streams: Streams, context: Context) -> Tensor:
        tokens = self.final_layer(streams["image"], context.modulation["image"])
        return unpatchify(tokens, self.preset.patch, streams.layout.grid)


def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Give every all-zero or constant tensor small random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() and float(p.std() if p.numel() > 1 else 0) == 0:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def make(name: str, seed: int = 0) -> Backbone:
    """A tiny randomised backbone by name."""
    configs: dict[str, Any] = {
        "dit": DiTConfig(depth=5, width=64, heads=4, image_size=SIZE, channels=CHANNELS, classes=10, learn_sigma=False),
        "u-toy": UToyConfig(depth=6, width=64, heads=4, image_size=SIZE, channels=CHANNELS, classes=10, learn_sigma=False),
        "mmdit": MMDiTConfig(
            depth=4, width=64, heads=4, image_size=SIZE, channels=CHANNELS, text_width=32, pooled_width=16, qk_norm="rms"
        ),
        "u-vit": UViTConfig(depth=4, width=64, heads=4, image_size=SIZE, channels=CHANNELS, classes=10),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise(configs[name].build(), seed)


def conditions(model: Backbone, samples: int = 2, branches: tuple[str, ...] = ("cond", "uncond")) -> dict[str, Condition]:
    """Random conditions, one per branch."""
    return {name: condition(model, samples, seed=k) for k, name in enumerate(branches)}


def condition(model: Backbone, samples: int, seed: int = 0) -> Condition:
    """A random condition of the kind the model takes."""
    g = torch.Generator().manual_seed(seed)
    if model.preset.family == "mmdit":
        text, pooled = torch.randn(samples, 6, 32, generator=g), torch.randn(samples, 16, generator=g)
        return Condition(text=text, pooled=pooled)
    return Condition(label=torch.randint(10, (samples,), generator=g))


def latent(samples: int = 2, seed: int = 0) -> Tensor:
    """A random latent batch."""
    return torch.randn(samples, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(seed + 100))


def schedule(model: Backbone, steps: int = 6, branches: tuple[str, ...] = ("cond", "uncond")) -> Schedule:
    """A uniform schedule with the model's native times."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return Schedule(tuple(times.tolist()), tuple(model.preset.time.native(times).tolist()), branches)
