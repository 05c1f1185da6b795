"""One or more tiny configurations of every family, and what the tests do with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditloom.backbones.dit import DiTConfig
from ditloom.backbones.lightning_dit import LightningDiTConfig
from ditloom.backbones.mmdit import MMDiTConfig
from ditloom.backbones.sit import SiTConfig
from ditloom.backbones.u_vit import UViTConfig
from ditloom.contracts.backbone import NOTHING, Backbone
from ditloom.contracts.condition import Condition
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.streams import Context, Streams

LATENT = {"depth": 3, "width": 64, "heads": 4, "patch": 2, "image_size": 8, "channels": 4}
ODD_HEAD = {**LATENT, "width": 96}  # heads of 24 features: an uneven split between two rotary axes shows
TEXT = {"text_width": 32, "text_tokens": 6}
MMDIT = {**ODD_HEAD, **TEXT, "pooled_width": 20, "table": 12, "table_span": 4}

TINY: dict[str, Any] = {
    "dit": DiTConfig(**LATENT, classes=10),
    "dit-unconditional": DiTConfig(**LATENT, classes=0, learn_sigma=False),
    "sit": SiTConfig(**LATENT, classes=10),
    "lightning-dit": LightningDiTConfig(**ODD_HEAD, classes=10),
    "lightning-dit-all": LightningDiTConfig(**ODD_HEAD, classes=10, qk_norm=True, shift=False, learn_sigma=True),
    "u-vit": UViTConfig(**{**LATENT, "depth": 4}, classes=10),
    "u-vit-text": UViTConfig(**{**LATENT, "depth": 2}, **TEXT, time_mlp=True, convolution=False),
    "mmdit": MMDiTConfig(**MMDIT, qk_norm="rms"),
    "mmdit-dual": MMDiTConfig(**{**MMDIT, "depth": 4, "pooled_width": 0}, dual=(0, 1)),
}

Plans = Mapping[int, tuple[BlockPlan, Mapping[str, Any]]]


def make(name: str, std: float = 0.08) -> Backbone:
    """The model with random values in every tensor, so that nothing passes because of a zero."""
    backbone = TINY[name].build()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in backbone.parameters():
            p.copy_(std * torch.randn(p.shape, generator=generator) + (1.0 if _is_scale(p, backbone) else 0.0))
    return backbone.eval()


def _is_scale(p: Tensor, backbone: Backbone) -> bool:
    return any(p is q for name, q in backbone.named_parameters() if "norm" in name and name.endswith("weight"))


def inputs(backbone: Backbone, batch: int = 3, masked: bool = True) -> tuple[Tensor, Tensor, Condition]:
    """(x, t, condition) with a different time and, where there is text, a different mask in every row."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        x, _, condition = backbone.example(batch)
    t = torch.linspace(0.9, 0.15, batch, dtype=torch.float64)
    if condition.text is None or not masked:
        return x, t, condition
    tokens = condition.text.shape[1]
    mask = torch.arange(tokens)[None] < torch.tensor([tokens - i % tokens for i in range(batch)])[:, None]
    return x, t, Condition(text=condition.text, text_mask=mask, pooled=condition.pooled)


def embedded(backbone: Backbone, x: Tensor, t: Tensor, condition: Condition) -> tuple[Streams, Context]:
    """What enters the first block."""
    return backbone.embed(x, backbone.preset.time.native(t), backbone.prepare(condition))


def planned(
    backbone: Backbone, x: Tensor, t: Tensor, condition: Condition, plans: Plans
) -> tuple[Tensor, dict[int, dict[str, Any]]]:
    """The forward as a loop over blocks under plans: {block: (plan, given)} to the prediction and what was kept."""
    streams, context = embedded(backbone, x, t, condition)
    left: dict[int, Streams] = {}
    kept: dict[int, dict[str, Any]] = {}
    for i, block in enumerate(backbone.blocks):
        plan, given = plans.get(i, (None, NOTHING))
        if i in backbone.skips:
            given = {**given, "skip": left[backbone.skips[i]].tokens}
        streams, kept[i] = block(streams, context, plan, given)
        left[i] = streams
    return backbone.head(streams, context), kept
