"""Tiny backbones for the mechanism's tests: every zero tensor re-randomised, so that nothing passes trivially."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditloom.backbones.dit import DiT, DiTConfig
from ditloom.backbones.mmdit import MMDiT, MMDiTConfig
from ditloom.backbones.skip_dit import SkipDiTConfig
from ditloom.backbones.u_vit import UViT, UViTConfig
from ditloom.contracts.backbone import NOTHING, Backbone, Transition
from ditloom.contracts.clock import Schedule
from ditloom.contracts.condition import Condition
from ditloom.contracts.layout import Layout, Span
from ditloom.contracts.streams import Context, Streams
from ditloom.parts import cost
from ditloom.parts.patches import unpatchify

SIZE, CHANNELS = 8, 4
NAMES = ("mmdit", "u-vit", "u-toy", "dit")
FAMILIES = ("mmdit", "u-vit", "u-toy", "dit", "u-vit-text", "mmdit-dual")


class ToyDiT(DiT):
    """A DiT that names the cost of one time embedding apart."""

    def end_macs(self, layout: Layout) -> dict[str, int]:
        ends, time = super().end_macs(layout), cost.linears(self.t_embedder, 1)
        return {**ends, "embed": ends["embed"] - time, "time": time}


class ToyMMDiT(MMDiT):
    """An MMDiT that names apart what is prepared once per run, and one time embedding."""

    def end_macs(self, layout: Layout) -> dict[str, int]:
        ends, time = super().end_macs(layout), cost.linears(self.t_embedder, 1)
        prepare = cost.linear(self.text_embedder, layout.span("text").length)
        if self.pooled_embedder is not None:
            prepare += cost.linears(self.pooled_embedder, 1)
        return {**ends, "embed": ends["embed"] - time - prepare, "time": time, "prepare": prepare}


class ToyUViT(UViT):
    """A U-ViT that names apart what is prepared once per run."""

    def end_macs(self, layout: Layout) -> dict[str, int]:
        ends = super().end_macs(layout)
        prepare = cost.linear(self.text_embedder, layout.span("text").length) if self.text_embedder else 0
        return {**ends, "embed": ends["embed"] - prepare, "prepare": prepare}


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


class UToy(ToyDiT):
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


SHAPE: dict[str, Any] = {"width": 64, "heads": 4, "image_size": SIZE, "channels": CHANNELS}
TEXT, POOLED, WORDS = 32, 16, 6
MODELS: dict[str, Any] = {
    "dit": lambda: ToyDiT(DiTConfig(depth=5, classes=10, learn_sigma=False, **SHAPE)),
    "skip-dit": lambda: SkipDiTConfig(depth=6, classes=10, learn_sigma=False, **SHAPE).build(),
    "u-toy": lambda: UToy(UToyConfig(depth=6, classes=10, learn_sigma=False, **SHAPE)),
    "mmdit": lambda: ToyMMDiT(MMDiTConfig(depth=4, text_width=TEXT, pooled_width=POOLED, qk_norm="rms", **SHAPE)),
    "mmdit-dual": lambda: ToyMMDiT(MMDiTConfig(depth=4, text_width=TEXT, pooled_width=POOLED, dual=(0, 2), **SHAPE)),
    "u-vit": lambda: ToyUViT(UViTConfig(depth=4, classes=10, **SHAPE)),
    "u-vit-text": lambda: ToyUViT(UViTConfig(depth=4, text_width=TEXT, text_tokens=8, **SHAPE)),
}


def make(name: str, seed: int = 0) -> Backbone:
    """A tiny randomised backbone by name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise(MODELS[name](), seed)


def conditions(
    model: Backbone, samples: int = 2, branches: tuple[str, ...] = ("cond", "uncond")
) -> dict[str, Condition]:
    """Random conditions, one per branch."""
    return {name: condition(model, samples, seed=k) for k, name in enumerate(branches)}


def condition(model: Backbone, samples: int, seed: int = 0, words: int = WORDS) -> Condition:
    """A random condition of the kind the model takes."""
    g = torch.Generator().manual_seed(seed)
    if getattr(model.preset, "text_width", 0):
        text = torch.randn(samples, words, TEXT, generator=g)
        pooled = torch.randn(samples, POOLED, generator=g) if hasattr(model, "pooled_embedder") else None
        return Condition(text=text, pooled=pooled)
    return Condition(label=torch.randint(10, (samples,), generator=g))


def latent(samples: int = 2, seed: int = 0) -> Tensor:
    """A random latent batch."""
    return torch.randn(samples, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(seed + 100))


def schedule(model: Backbone, steps: int = 6, branches: tuple[str, ...] = ("cond", "uncond")) -> Schedule:
    """A uniform schedule with the model's native times."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return Schedule(tuple(times.tolist()), tuple(model.preset.time.native(times).tolist()), branches)
