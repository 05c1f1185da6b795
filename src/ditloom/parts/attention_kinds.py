"""Kinds of self-attention by name, for families that let a setting choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ditloom.contracts.errors import UnknownName
from ditloom.parts.attention import SelfAttention
from ditloom.parts.differential import DiffAttention, DintAttention

Make = Callable[..., SelfAttention]


def _softmax(width: int, heads: int, *, layer: int, **more: Any) -> SelfAttention:
    return SelfAttention(width, heads, **more)


KINDS: Mapping[str, Make] = {"softmax": _softmax, "diff": DiffAttention, "dint": DintAttention}


def self_attention(kind: str, width: int, heads: int, layer: int, **more: Any) -> SelfAttention:
    """The self-attention of block `layer` (0-based); `UnknownName` for a kind that there is not."""
    if kind not in KINDS:
        raise UnknownName("kind of attention", kind, KINDS)
    return KINDS[kind](width, heads, layer=layer, **more)
