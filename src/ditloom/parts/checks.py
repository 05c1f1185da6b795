"""One clear sentence for conditions that do not fit a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Segment


def check_text(text: Tensor | None, mask: Tensor | None, width: int, family: str) -> Tensor:
    """Token states [B, n, width] with a mask [B, n], or a sentence what is wrong with them."""
    if text is None:
        raise UserError(f"{family} is conditional on text: give Condition(text=...) of shape [batch, tokens, {width}]")
    if text.ndim != 3 or text.shape[-1] != width:
        raise UserError(f"{family} takes text of shape [batch, tokens, {width}]; got {list(text.shape)}")
    if text.shape[1] == 0:
        raise UserError(f"{family} needs at least one text token; an empty prompt is encoded, not left out")
    if mask is not None and mask.shape != text.shape[:2]:
        raise UserError(f"a text mask has the shape [batch, tokens] = {list(text.shape[:2])}; got {list(mask.shape)}")
    return text


def check_pooled(pooled: Tensor | None, width: int, family: str) -> Tensor:
    """A pooled vector [B, width], or a sentence what is wrong with it."""
    if pooled is None:
        raise UserError(f"{family} needs a pooled text vector: give Condition(pooled=...) of shape [batch, {width}]")
    if pooled.ndim != 2 or pooled.shape[-1] != width:
        raise UserError(f"{family} takes a pooled vector of shape [batch, {width}]; got {list(pooled.shape)}")
    return pooled


def check_rows(x: Tensor, given: Tensor | None, what: str) -> None:
    """Refuse a condition for another number of rows than x has."""
    if given is not None and given.shape[0] != x.shape[0]:
        raise UserError(f"x has {x.shape[0]} rows and the {what} {given.shape[0]}")


def check_grid_only(time: Tensor, segments: Sequence[Segment], family: str, why: str) -> None:
    """Refuse added segments, and times per token, in a family that has one grid and one time per image."""
    check_no_segments(segments, family, why)
    if time.ndim != 1:
        raise UserError(f"{family} has one time per image; got times of shape {list(time.shape)}")


def check_no_segments(segments: Sequence[Segment], family: str, why: str) -> None:
    """Refuse added segments in a family that needs the grid it has."""
    if segments:
        raise UserError(f"{family} takes no segment {segments[0].name!r}: {why}")


def check_no_rule(rule: Any, family: str, why: str) -> None:
    """Refuse an attention rule in a family without attention between all tokens."""
    if rule is not None:
        raise UserError(f"{family} takes no attention rule: {why}")


def check_heads(width: int, heads: int) -> None:
    """One sentence where a width cannot be cut into heads."""
    if heads < 1 or width % heads:
        raise UserError(f"width {width} is not a multiple of {heads} heads")


def check_guidance(given: Tensor | None, default: float | None, like: Tensor, family: str) -> Tensor | None:
    """The guidance scales [B] told to a guidance-distilled model; None for one that is not."""
    if default is None:
        if given is not None:
            raise UserError(f"this {family} has no guidance input: leave Condition.extra['guidance'] out")
        return None
    if given is None:
        return torch.full((len(like),), default, dtype=torch.float64, device=like.device)
    if given.shape != like.shape[:1]:
        raise UserError(f"guidance is one scale per image, [batch] = [{len(like)}]; got {list(given.shape)}")
    return given.to(torch.float64)


def check_layers(
    states: Tensor | None, mask: Tensor | None, count: int, width: int, family: str
) -> tuple[Tensor, Tensor | None]:
    """A language model's states [B, at least `count`, n, width] with a mask [B, n], or what is wrong with them."""
    wanted = f"[batch, {count} or more states, tokens, {width}]"
    if states is None:
        raise UserError(f"{family} reads a language model: give Condition(extra={{'llama': ...}}) of shape {wanted}")
    if states.ndim != 4 or states.shape[1] < count or states.shape[2] == 0 or states.shape[3] != width:
        raise UserError(f"{family} takes a language model's states of shape {wanted}; got {list(states.shape)}")
    if mask is not None and mask.shape != (states.shape[0], states.shape[2]):
        expected = [states.shape[0], states.shape[2]]
        raise UserError(f"the mask of a language model's tokens has the shape {expected}; got {list(mask.shape)}")
    return states, mask
