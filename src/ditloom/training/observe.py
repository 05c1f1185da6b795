"""A training forward that hands out what objectives want to see of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ditloom.contracts.backbone import NOTHING, Backbone
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Tap
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.streams import Streams


def observe(
    backbone: Backbone, x: Tensor, t: Any, condition: Condition, taps: Sequence[Tap] = ()
) -> tuple[Tensor, dict[Tap, Any]]:
    """The prediction, and the tensor at each tap; without taps the backbone's plain forward."""
    if not taps:
        return backbone(x, t, condition), {}
    _check(backbone, taps)
    streams, context = backbone.embed(x, backbone.preset.time.native(t), backbone.prepare(condition))
    captured: dict[Tap, Any] = {}
    waiting: dict[int, Mapping[str, Tensor]] = {}
    for i, block in enumerate(backbone.blocks):
        here = [tap for tap in taps if tap.block == i]
        captured |= {tap: _segment(tap, streams) for tap in here if tap.stage == "block_in"}
        inner = [tap for tap in here if tap.stage not in ("block_in", "block_out")]
        plan = BlockPlan(keep=tuple(sorted({_key(tap) for tap in inner}))) if inner else None
        given = {"skip": waiting[backbone.skips[i]]} if i in backbone.skips else NOTHING
        streams, kept = backbone.call(block, streams, context, plan, given)
        captured |= {tap: kept[_key(tap)] for tap in inner}
        captured |= {tap: _segment(tap, streams) for tap in here if tap.stage == "block_out"}
        if i in backbone.skips.values():
            waiting[i] = streams.tokens
    return backbone.head(streams, context), captured
