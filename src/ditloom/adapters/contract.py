"""What one writes to join a foreign model: its class, its blocks, and its root forward in two halves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ditloom.adapters.call import Call
from ditloom.adapters.guidance import Told
from ditloom.contracts.backbone import Block
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Span
from ditloom.contracts.streams import Context, Streams
from ditloom.contracts.time import FLOW, TimeInput


class Adapter(ABC):
    """One foreign architecture. `embed` and `head` re-express its root forward around the blocks, and no more.

    library, versions: where the class comes from, and from which version (inclusive) to which (exclusive) this file
    was checked; empty for a model of the user's own. classes: names of the root module's class. pipelines: per
    pipeline class, what tells its guidance. roots: where a pipeline keeps such modules. time, predicts: the units of
    its time input, and its target. sample, timestep: names of the arguments that hold x and the time. static:
    arguments without batch rows. refuses: arguments under which methods cannot act, with the reason; passes:
    arguments under which a call is left to the original forward. lora_scale: the argument that may hold one. missing:
    sites and stages it lacks, with the reason.
    """

    library: ClassVar[str] = ""
    versions: ClassVar[tuple[str, str]] = ("", "")
    classes: ClassVar[tuple[str, ...]] = ()
    pipelines: ClassVar[Mapping[str, Told]] = {}
    roots: ClassVar[tuple[str, ...]] = ("transformer",)
    time: TimeInput = FLOW
    predicts: ClassVar[str] = ""
    sample: ClassVar[str] = "hidden_states"
    timestep: ClassVar[str] = "timestep"
    static: ClassVar[tuple[str, ...]] = ()
    refuses: ClassVar[Mapping[str, str]] = {}
    passes: ClassVar[tuple[str, ...]] = ()
    lora_scale: ClassVar[str] = ""
    missing: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def blocks(self, module: Any) -> list[Block]:
        """Its blocks and transitions in execution order."""

    @abstractmethod
    def embed(self, module: Any, call: Call) -> tuple[Streams, Context]:
        """What happens before the first block."""

    @abstractmethod
    def head(self, module: Any, streams: Streams, context: Context) -> Tensor:
        """What happens after the last block."""

    def skips(self, module: Any) -> Mapping[int, int]:
        """Long skips: consumer -> source."""
        return {}

    def end_macs(self, module: Any, layout: Layout) -> dict[str, int]:
        """Multiply-accumulates per batch row outside the blocks: "embed" and "head"."""
        return {"embed": 0, "head": 0}

    def layout(self, module: Any) -> Layout:
        """Some layout with the right segments, at which methods are tried before the first call."""
        return Layout((Span("image", 16),), (4, 4))

    def time_of(self, module: nn.Module) -> TimeInput:
        """The units of its time input, where the module has a say in them."""
        return self.time

    def values_of(self, module: Any, timesteps: Tensor) -> Tensor:
        """A scheduler's timesteps as they arrive in the argument `timestep`."""
        return timesteps

    def result(self, output: Tensor, call: Call) -> Any:
        """The prediction in the container the caller expects."""
        return output

    def prediction(self, result: Any) -> Tensor:
        """The inverse of `result`."""
        return result

    def check(self, values: Mapping[str, Any]) -> None:
        """Refuse a call under whose arguments methods cannot act."""
        for name, reason in self.refuses.items():
            if values.get(name) is not None:
                raise UserError(f"methods cannot act on a call with {name}: {reason}")


def one_stream(tokens: Tensor, grid: tuple[int, ...] = ()) -> Streams:
    """The streams of a model whose tokens [B, n, D] all run through the same weights."""
    return Streams({"image": tokens}, Layout((Span("image", tokens.shape[1]),), grid))
