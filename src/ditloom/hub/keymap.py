"""Tables that say, in both directions, which tensor of another code base is which of ours.

A map is a list of entries; the first entry that names one of our tensors has it. In a pattern ``{i}`` is a block's
number, ``{p}`` is weight or bias, and ``{rest}`` is the end of a name. An entry may hold for some of our blocks only
(`where`, with transitions counted, as they stand in the list), which they may number from the first (`from_zero`).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError

Tensors = dict[str, Tensor]
Where = Callable[[Any], range]
PLACES = {"{i}": r"(?P<i>\d+)", "{p}": r"(?P<p>weight|bias)", "{rest}": r"(?P<rest>.+)"}


class Change(ABC):
    """What happens to the values on the way."""

    @abstractmethod
    def out(self, ours: Tensor) -> Tensor:
        """Our tensor as theirs."""

    @abstractmethod
    def back(self, theirs: Tensor, like: Tensor) -> Tensor:
        """Their tensor as ours, in the shape of `like`."""


class Same(Change):
    """Nothing."""

    def out(self, ours: Tensor) -> Tensor:
        return ours

    def back(self, theirs: Tensor, like: Tensor) -> Tensor:
        return theirs


class SingleFrame(Change):
    """A 3-D kernel of one frame, [D, C, 1, p, p], as a 2-D kernel [D, C, p, p]; a bias stays."""

    def out(self, ours: Tensor) -> Tensor:
        return ours.squeeze(2) if ours.ndim == 5 else ours

    def back(self, theirs: Tensor, like: Tensor) -> Tensor:
        return theirs.reshape(like.shape)


class Unbatched(Change):
    """A table [n, D] as [1, n, D]."""

    def out(self, ours: Tensor) -> Tensor:
        return ours[None]

    def back(self, theirs: Tensor, like: Tensor) -> Tensor:
        return theirs.reshape(like.shape)


class SwapHalves(Change):
    """(shift, scale) to (scale, shift) along the rows, and back."""

    def out(self, ours: Tensor) -> Tensor:
        return torch.cat(ours.chunk(2)[::-1])

    def back(self, theirs: Tensor, like: Tensor) -> Tensor:
        return self.out(theirs)


class FlatTable(Change):
    """A table [h, w, D] as [1, h * w, D]."""

    def out(self, ours: Tensor) -> Tensor:
        return ours.flatten(0, 1)[None]

    def back(self, theirs: Tensor, like: Tensor) -> Tensor:
        return theirs.reshape(like.shape)


class Flat2d(Change):
    """A patch convolution [D, C, p, p] as a linear layer [D, C * p * p]; a bias stays as it is."""

    def out(self, ours: Tensor) -> Tensor:
        return ours.flatten(1) if ours.ndim > 1 else ours

    def back(self, theirs: Tensor, like: Tensor) -> Tensor:
        return theirs.reshape(like.shape)


class Pointwise(Change):
    """A linear layer's weight as a 1x1 convolution's, [out, in, 1, 1]; a bias stays."""

    def out(self, ours: Tensor) -> Tensor:
        return ours[..., None, None] if ours.ndim == 2 else ours

    def back(self, theirs: Tensor, like: Tensor) -> Tensor:
        return theirs.reshape(like.shape)


class ChannelsLast(Flat2d):
    """The same with the channels moving fastest: [D, p * p * C]."""

    def out(self, ours: Tensor) -> Tensor:
        return super().out(ours.permute(0, 2, 3, 1) if ours.ndim > 1 else ours)

    def back(self, theirs: Tensor, like: Tensor) -> Tensor:
        if like.ndim == 1:
            return theirs
        d, channels, patch, _ = like.shape
        return theirs.reshape(d, patch, patch, channels).permute(0, 3, 1, 2).contiguous()


SAME, SWAP, FLAT, LINEAR, CHANNELS_LAST = Same(), SwapHalves(), FlatTable(), Flat2d(), ChannelsLast()
POINTWISE, FRAME, TABLE = Pointwise(), SingleFrame(), Unbatched()


class Entry(ABC):
    """One line of a map."""

    ours: str = ""
    where: Where | None = None
    from_zero: bool = False

    def claims(self, name: str, config: Any) -> dict[str, Any] | None:
        """The placeholders' values if `name` is a tensor of ours that this entry speaks of."""
        match = _pattern(self.ours).fullmatch(name) if self.ours else None
        if match is None or self.where is None:
            return match.groupdict() if match else None
        blocks, i = self.where(config), int(match["i"])
        if i not in blocks:
            return None
        return {**match.groupdict(), "i": i - blocks.start if self.from_zero else i}

    @abstractmethod
    def out(self, found: Mapping[str, Any], ours: Tensor, config: Any) -> Tensors:
        """Their tensors that one of ours becomes."""

    @abstractmethod
    def back(self, found: Mapping[str, Any], theirs: Mapping[str, Tensor], like: Tensor, config: Any) -> Tensor:
        """Our tensor, from theirs."""

    def merged(self, before: Tensor | None, new: Tensor) -> Tensor:
        """Their tensor when another of ours has given a part of it already (`before`)."""
        return new

    def added(self, config: Any) -> Tensors:
        """Tensors that only they store."""
        return {}


@dataclass(frozen=True)
class Move(Entry):
    """One tensor is one tensor."""

    theirs: str
    ours: str
    change: Change = SAME
    where: Where | None = None
    from_zero: bool = False

    def out(self, found: Mapping[str, Any], ours: Tensor, config: Any) -> Tensors:
        return {self.theirs.format(**found): self.change.out(ours)}

    def back(self, found: Mapping[str, Any], theirs: Mapping[str, Tensor], like: Tensor, config: Any) -> Tensor:
        return self.change.back(theirs[self.theirs.format(**found)], like)


@dataclass(frozen=True)
class Placed(Move):
    """One tensor is one tensor, in a model whose blocks they do not number through.

    `places` gives, for the positions of ours that the entry holds for, what to write into their name.
    """

    places: Callable[[Any], Mapping[int, Mapping[str, Any]]] = field(default=lambda config: {}, compare=False)

    def claims(self, name: str, config: Any) -> dict[str, Any] | None:
        found = super().claims(name, config)
        place = self.places(config).get(int(found["i"])) if found else None
        return None if found is None or place is None else {**found, **place}


@dataclass(frozen=True)
class Fuse(Entry):
    """Several of theirs, equally tall, stand one above the other in one of ours."""

    theirs: tuple[str, ...]
    ours: str
    where: Where | None = None
    from_zero: bool = False

    def out(self, found: Mapping[str, Any], ours: Tensor, config: Any) -> Tensors:
        parts = ours.chunk(len(self.theirs))
        return {name.format(**found): part for name, part in zip(self.theirs, parts, strict=True)}

    def back(self, found: Mapping[str, Any], theirs: Mapping[str, Tensor], like: Tensor, config: Any) -> Tensor:
        return torch.cat([theirs[name.format(**found)] for name in self.theirs])


@dataclass(frozen=True)
class PlacedFuse(Fuse):
    """`Fuse` in a model whose blocks they do not number through; `places` as in `Placed`."""

    places: Callable[[Any], Mapping[int, Mapping[str, Any]]] = field(default=lambda config: {}, compare=False)

    def claims(self, name: str, config: Any) -> dict[str, Any] | None:
        found = super().claims(name, config)
        place = self.places(config).get(int(found["i"])) if found else None
        return None if found is None or place is None else {**found, **place}


@dataclass(frozen=True)
class Part(Entry):
    """One of ours is the first or last part of one of theirs, along an axis; the other part has an entry of its own."""

    theirs: str
    ours: str
    axis: int = 0
    last: bool = False
    where: Where | None = None
    from_zero: bool = False

    def out(self, found: Mapping[str, Any], ours: Tensor, config: Any) -> Tensors:
        return {self.theirs.format(**found): ours}

    def merged(self, before: Tensor | None, new: Tensor) -> Tensor:
        if before is None:
            return new
        return torch.cat([before, new] if self.last else [new, before], dim=self.axis)

    def back(self, found: Mapping[str, Any], theirs: Mapping[str, Tensor], like: Tensor, config: Any) -> Tensor:
        whole, size = theirs[self.theirs.format(**found)], like.shape[self.axis]
        return whole.narrow(self.axis, whole.shape[self.axis] - size if self.last else 0, size).contiguous()


@dataclass(frozen=True)
class Experts(Entry):
    """They keep experts apart, numbered {e}, where ours are stacked; several of theirs stand one above the other."""

    theirs: tuple[str, ...]
    ours: str
    where: Where | None = None
    from_zero: bool = False

    def out(self, found: Mapping[str, Any], ours: Tensor, config: Any) -> Tensors:
        return {
            name.format(**found, e=e): part
            for e, expert in enumerate(ours)
            for name, part in zip(self.theirs, expert.chunk(len(self.theirs)), strict=True)
        }

    def back(self, found: Mapping[str, Any], theirs: Mapping[str, Tensor], like: Tensor, config: Any) -> Tensor:
        experts = [[theirs[name.format(**found, e=e)] for name in self.theirs] for e in range(len(like))]
        return torch.stack([torch.cat(parts) for parts in experts])


@dataclass(frozen=True)
class Copies(Entry):
    """They keep one of ours once in every block; the copies must agree."""

    theirs: str
    ours: str

    def out(self, found: Mapping[str, Any], ours: Tensor, config: Any) -> Tensors:
        return {self.theirs.format(**{**found, "i": i}): ours for i in range(config.depth)}

    def back(self, found: Mapping[str, Any], theirs: Mapping[str, Tensor], like: Tensor, config: Any) -> Tensor:
        first, *others = (self.theirs.format(**{**found, "i": i}) for i in range(config.depth))
        for name in others:
            if not torch.equal(theirs[name], theirs[first]):
                raise UserError(f"{name} differs from {first}: this model has one of them for all its blocks")
        return theirs[first]


@dataclass(frozen=True)
class Derived(Entry):
    """They store a table that follows from the settings; `make` gives it, or None where the model has none."""

    theirs: str
    make: Callable[[Any], Tensor | None] = field(compare=False)
    what: str = "table"

    def added(self, config: Any) -> Tensors:
        value = self.make(config)
        return {} if value is None else {self.theirs: value}

    def out(self, found: Mapping[str, Any], ours: Tensor, config: Any) -> Tensors:
        return {}

    def back(self, found: Mapping[str, Any], theirs: Mapping[str, Tensor], like: Tensor, config: Any) -> Tensor:
        raise AssertionError("a derived table is none of our tensors")

    def verify(self, theirs: Mapping[str, Tensor], config: Any) -> None:
        """Refuse a checkpoint whose table is another one: it would become a different model in silence."""
        for name, value in self.added(config).items():
            stored = theirs[name]
            tolerance = 1e-4 if stored.dtype in (torch.float32, torch.float64) else 1e-2
            if not torch.allclose(stored.float(), value.float(), rtol=0, atol=tolerance):
                raise UserError(f"{name} in the checkpoint is not the {self.what} that this model computes")


class KeyMap:
    """The entries of one foreign format."""

    def __init__(self, *entries: Entry):
        self.entries = entries

    def out(self, ours: Mapping[str, Tensor], config: Any) -> Tensors:
        """All their tensors from all of ours; works on the meta device too, for names and shapes."""
        theirs: Tensors = {}
        for name, value in ours.items():
            entry, found = self._entry(name, config)
            for key, new in entry.out(found, value, config).items():
                theirs[key] = entry.merged(theirs.get(key), new)
        dtype = next(iter(ours.values())).dtype
        for entry in self.entries:
            theirs.update({name: value.to(dtype) for name, value in entry.added(config).items()})
        return theirs

    def back(self, theirs: Mapping[str, Tensor], like: Mapping[str, Tensor], config: Any) -> Tensors:
        """Our tensors, named and shaped as `like`, from all of theirs."""
        for entry in self.entries:
            if isinstance(entry, Derived):
                entry.verify(theirs, config)
        ours: Tensors = {}
        for name, value in like.items():
            entry, found = self._entry(name, config)
            ours[name] = entry.back(found, theirs, value, config)
        return ours

    def _entry(self, name: str, config: Any) -> tuple[Entry, dict[str, Any]]:
        for entry in self.entries:
            found = entry.claims(name, config)
            if found is not None:
                return entry, found
        raise UserError(f"this format has no place for {name}")


@lru_cache(maxsize=1024)
def _pattern(text: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\})", text)
    return re.compile("".join(PLACES.get(part) or re.escape(part) for part in parts))
