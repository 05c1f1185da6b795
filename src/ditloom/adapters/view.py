"""A live foreign module as a backbone: the same parameters, the same blocks, its root forward re-expressed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditloom.adapters.call import Arguments, Call
from ditloom.adapters.contract import Adapter
from ditloom.contracts.backbone import Backbone, BackboneConfig
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.streams import Context, Memory, Streams


@dataclass(frozen=True, kw_only=True)
class ViewConfig(BackboneConfig):
    """Names an adapted model where a native one names its family."""

    adapter: str = ""

    @property
    def family(self) -> str:  # type: ignore[override]
        return self.adapter

    def build(self) -> Backbone:
        raise UserError(f"{self.adapter} is a live model of another library: it is built there")


class View(Backbone):
    """The Backbone protocol over a module in which nothing is replaced.

    What a run hands down is the call itself (`Arguments`), so that x, time and conditions keep their form and dtype.
    """

    def __init__(self, adapter: Adapter, module: nn.Module):
        super().__init__()
        self.adapter, self.live = adapter, module
        self.preset = ViewConfig(adapter=type(module).__name__, time=adapter.time_of(module))
        self.blocks = nn.ModuleList(adapter.blocks(module))
        self.skips = adapter.skips(module)
        self.missing = adapter.missing  # type: ignore[assignment]
        self._known: tuple[Call, bool, tuple[Streams, Context]] | None = None

    @property
    def checkpointing(self) -> bool:  # type: ignore[override]
        """As the module says."""
        return bool(getattr(self.live, "gradient_checkpointing", False))

    def prepare(self, condition: Condition) -> Memory:
        raise UserError("an adapted model is told everything on every call; nothing is prepared")

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        assert isinstance(memory, Arguments) and memory.call is not None
        if self._known is not None and self._known[:2] == (memory.call, torch.is_grad_enabled()):
            return self._known[2]
        return self.adapter.embed(self.live, memory.call)

    @contextmanager
    def knowing(self, call: Call) -> Iterator[Layout]:
        """Inside, this call need not be embedded again; yields the layout of its tokens."""
        found = self.adapter.embed(self.live, call)
        self._known = (call, torch.is_grad_enabled(), found)
        try:
            yield found[0].layout
        finally:
            self._known = None

    def call(
        self, block: nn.Module, streams: Streams, context: Context, plan: BlockPlan | None, given: Mapping[str, Any]
    ) -> tuple[Streams, dict[str, Any]]:
        if block._compiled_call_impl is None and not (torch.is_grad_enabled() and self.checkpointing):
            return block.forward(streams, context, plan, given)  # around it is nothing: hooks are on the foreign block
        return super().call(block, streams, context, plan, given)

    def head(self, streams: Streams, context: Context) -> Tensor:
        return self.adapter.head(self.live, streams, context)

    def plain(self, call: Call) -> Tensor:
        """The prediction with nothing attached."""
        streams, context = self.adapter.embed(self.live, call)
        return self.head(self.run(streams, context), context)

    def end_macs(self, layout: Layout) -> dict[str, int]:
        return self.adapter.end_macs(self.live, layout)

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> Any:
        raise UserError("an adapted model is called by its own library")
