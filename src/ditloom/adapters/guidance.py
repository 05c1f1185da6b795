"""How a pipeline tells which guidance branches a call of its transformer holds: said by it, never counted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ditloom.contracts.errors import UserError

BOTH = ("cond", "uncond")


@dataclass
class Heard:
    """What was heard since the run began: prompts that were encoded, and the name the pipeline gives to a call."""

    encodings: list[Mapping[str, Any]] = field(default_factory=list)
    context: str | None = None

    def encoding(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` (a pipeline's encode_prompt), listened to."""
        signature = inspect.signature(function)

        def listened(*args: Any, **kwargs: Any) -> Any:
            self.encodings.append(signature.bind_partial(*args, **kwargs).arguments)
            return function(*args, **kwargs)

        return listened

    def named(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` (a transformer's cache_context), listened to."""

        @contextmanager
        def listened(name: str, **kwargs: Any) -> Iterator[None]:
            with self.calling(name), function(name, **kwargs):
                yield

        return listened

    @contextmanager
    def calling(self, name: str) -> Iterator[None]:
        """Calls inside belong to the branch `name`."""
        before, self.context = self.context, name
        try:
            yield
        finally:
            self.context = before


Guided = Callable[[Any, Mapping[str, Any], Heard], bool]
"""Whether a run is guided, from the pipeline, the arguments of a call of its transformer, and what was heard."""


def by_property(pipe: Any, values: Mapping[str, Any], heard: Heard) -> bool:
    """The pipeline has `do_classifier_free_guidance`."""
    return bool(pipe.do_classifier_free_guidance)


def by_scale(pipe: Any, values: Mapping[str, Any], heard: Heard) -> bool:
    """The pipeline guides when its scale is above 1."""
    return float(pipe.guidance_scale) > 1


def by_encoding(pipe: Any, values: Mapping[str, Any], heard: Heard) -> bool:
    """The pipeline told its encoder whether it guides."""
    return bool(heard.encodings and heard.encodings[-1].get("do_classifier_free_guidance", True))


def by_negative(pipe: Any, values: Mapping[str, Any], heard: Heard) -> bool:
    """The pipeline encodes a negative prompt after the prompt only when it guides."""
    return len(heard.encodings) > 1


@dataclass(frozen=True)
class Told:
    """What tells the guidance of a pipeline. order: the branches of a guided call, by rows, or one call after another.

    apart: one call per branch, each inside ``transformer.cache_context(name)``; else one call holds all of them.
    """

    guided: Guided
    order: tuple[str, ...] = ("uncond", "cond")
    apart: bool = False

    def branches(self, pipe: Any, values: Mapping[str, Any], heard: Heard) -> tuple[str, ...]:
        """All branches of the run."""
        return self.order if self.guided(pipe, values, heard) else ("cond",)

    def rows(self, branches: tuple[str, ...], heard: Heard) -> tuple[str, ...]:
        """The branches of one call, in the order of its rows."""
        if not self.apart:
            return branches
        if heard.context is None:
            raise UserError("the pipeline did not say which guidance branch its transformer is called for")
        return (heard.context,)
