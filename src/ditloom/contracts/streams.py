"""What flows through the blocks (`Streams`), what they read (`Context`), and what is prepared once (`Memory`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from ditloom.contracts.layout import Layout


@dataclass(frozen=True)
class Streams:
    """Token tensors by stream, each [B, n, D] (a stream is a weight set; segments share it by the layout)."""

    tokens: dict[str, Tensor]
    layout: Layout

    def __getitem__(self, stream: str) -> Tensor:
        return self.tokens[stream]

    def segment(self, name: str) -> Tensor:
        """The tokens of one segment [B, n, D]."""
        return self.tokens[self.layout.span(name).stream][:, self.layout.slice(name)]

    def updated(self, **tokens: Tensor) -> Streams:
        """The same layout with some streams replaced."""
        return Streams({**self.tokens, **tokens}, self.layout)

    def map(self, fn: Any, *others: Streams) -> Streams:
        """`fn` applied stream by stream (to several Streams of one layout at a time)."""
        return replace(self, tokens={k: fn(v, *(o.tokens[k] for o in others)) for k, v in self.tokens.items()})


@dataclass(frozen=True)
class Context:
    """What every block reads besides the streams.

    modulation: per stream the conditioning vector [B, 1, D], one per group of the layout [B, G, D], or one per
    token [B, n, D]. rotary: per stream the pair (cos, sin), each [n, d] or [B, n, d]. rule: how tokens may attend
    (None: all to all). gates: the tensors that rule names. time: the time embedding [B, D] before anything is added.
    """

    modulation: dict[str, Tensor] = field(default_factory=dict)
    rotary: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    rule: Any = None
    gates: dict[str, Tensor] = field(default_factory=dict)
    time: Tensor | None = None
    shared: dict[str, Any] = field(default_factory=dict)

    def spread(self, values: Tensor, layout: Layout, stream: str = "image") -> Tensor:
        """Per-group values [B, G, D] to something that broadcasts over the tokens of `stream`."""
        groups = layout.groups(stream)
        if len(groups) == 1 or values.shape[1] != len(groups):
            return values
        parts = [values[:, g : g + 1].expand(-1, n, -1) for g, n in enumerate(groups)]
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Memory:
    """All that is independent of x and t, computed once per run: vectors, text tokens, their mask."""

    vector: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


for _cls in (Streams, Context, Memory):
    register_dataclass(_cls, field_names=[f.name for f in fields(_cls)])
