"""What a network is told besides x and t: labels, text, pooled vectors, images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass


@dataclass(frozen=True)
class Condition:
    """Conditioning of a batch; every tensor has the batch as its first axis, an absent one is None.

    label [B] class index; text [B, n, d] token states with text_mask [B, n] (True = a real token);
    pooled [B, d] one vector per prompt; extra named tensors [B, ...].
    """

    label: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    pooled: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def batch(self) -> int | None:
        """Number of rows, or None when nothing is given."""
        return next((len(t) for t in self.tensors().values()), None)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {k: v for k, v in {**named, **self.extra}.items() if v is not None}

    def map(self, fn: Callable[[Tensor], Tensor]) -> Condition:
        """The same condition with `fn` applied to every tensor."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        kept = {k: fn(v) if v is not None else None for k, v in named.items()}
        return Condition(**kept, extra={k: fn(v) for k, v in self.extra.items()})

    def rows(self, index: slice | Tensor | Sequence[int]) -> Condition:
        """Some rows of the batch."""
        return self.map(lambda t: t[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Move; `dtype` is applied to floating tensors only."""
        return self.map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    @staticmethod
    def aligned(parts: Sequence[Condition]) -> Sequence[Condition]:
        """The same batches with texts of one length and, if any has one, a mask: what `cat` joins."""
        lengths = {p.text.shape[1] for p in parts if p.text is not None}
        masked = {p.text_mask is not None for p in parts if p.text is not None}
        if len(lengths) < 2 and len(masked) < 2:
            return parts
        return [_pad(p, max(lengths)) if p.text is not None else p for p in parts]

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Stack batches; texts of unequal length are padded with masked zeros."""
        parts = Condition.aligned(parts)
        joined: dict[str, Tensor | None] = {}
        for name in ("label", "text", "text_mask", "pooled"):
            values = [getattr(p, name) for p in parts]
            present = [v for v in values if v is not None]
            if present and len(present) != len(values):
                raise ValueError(f"conditions disagree: {name} is given in some parts and not in others")
            joined[name] = torch.cat(present) if present else None
        extra = {k: torch.cat([p.extra[k] for p in parts]) for k in parts[0].extra}
        return Condition(**joined, extra=extra)


def _pad(part: Condition, length: int) -> Condition:
    assert part.text is not None
    missing = length - part.text.shape[1]
    mask = part.text_mask
    if mask is None:
        mask = torch.ones(part.text.shape[:2], dtype=torch.bool, device=part.text.device)
    text = torch.nn.functional.pad(part.text, (0, 0, 0, missing))
    return Condition(part.label, text, torch.nn.functional.pad(mask, (0, missing)), part.pooled, part.extra)


register_dataclass(Condition, field_names=[f.name for f in fields(Condition)])
