"""One or more tiny configurations of every family, and what the tests do with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.backbone import NOTHING, Backbone
from ditloom.contracts.condition import Condition
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.streams import Context, Streams
from tests.backbones.portrait import PORTRAITS, Portrait

TINY: dict[str, Any] = {name: config for p in PORTRAITS.values() for name, config in p.tiny.items()}
OF: dict[str, Portrait] = {name: p for p in PORTRAITS.values() for name in p.tiny}

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
    return x, t, replace(condition, text_mask=mask)


def embedded(backbone: Backbone, x: Tensor, t: Tensor, condition: Condition) -> tuple[Streams, Context]:
    """What enters the first block."""
    return backbone.embed(x, backbone.preset.time.native(t), backbone.prepare(condition))


def of_kind(backbone: Backbone, *sites: str) -> list[int]:
    """Flat positions of the blocks (no transitions) that have all these sites."""
    blocks = enumerate(backbone.blocks)
    return [i for i, block in blocks if not block.is_transition and all(site in block.sites for site in sites)]


def planned(
    backbone: Backbone, x: Tensor, t: Tensor, condition: Condition, plans: Plans
) -> tuple[Tensor, dict[int, dict[str, Any]]]:
    """The forward as a loop over blocks under plans: {block: (plan, given)} to the prediction and what was kept."""
    streams, context = embedded(backbone, x, t, condition)
    left: dict[int, Streams] = {}
    kept: dict[int, dict[str, Any]] = {}
    for i, block in enumerate(backbone.blocks):
        plan, given = plans.get(i, (None, NOTHING))
        given = {**backbone.handed(i, context), **given}
        if i in backbone.skips:
            given = {**given, "skip": left[backbone.skips[i]].tokens}
        streams, kept[i] = block(streams, context, plan, given)
        left[i] = streams
    return backbone.head(streams, context), kept
