"""One clear sentence for conditions that do not fit a model."""

from __future__ import annotations

from torch import Tensor

from ditloom.contracts.errors import UserError


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
