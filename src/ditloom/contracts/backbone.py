"""The backbone contract: embed, blocks, head. A pure network without sampler, cache or device logic."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.contracts.time import FLOW, TimeInput

NOTHING: Mapping[str, Any] = {}
PER_BLOCK_STAGES = ("modulated_in",)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Settings of one model; each family subclasses it. `build()` makes the network."""

    family: ClassVar[str] = ""

    time: TimeInput = FLOW

    @abstractmethod
    def build(self) -> Backbone:
        """A freshly initialised network."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json; `from_dict` is its inverse."""
        return {"family": self.family, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BackboneConfig:
        """The configuration from plain values; an unknown key names the nearest one."""
        known = {f.name for f in fields(cls)}
        given = {k: v for k, v in values.items() if k != "family"}
        for key in given.keys() - known:
            raise UnknownName(f"{cls.__name__} setting", key, known)
        if isinstance(given.get("time"), Mapping):
            given["time"] = TimeInput(**given["time"])
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        return cls(**plain)


class Block(nn.Module):
    """One block: a pure function ``block(streams, context, plan, given) -> (streams, kept)``.

    `plan` says what to compute, reuse, edit and capture; tensors to use come in `given` (a long skip as
    given["skip"]); captured tensors and auxiliary values go out in `kept`. Nothing else is read or written.
    auxiliary: values [B, ...] that a plan may ask for and that are no tokens (what a balance loss is made of).
    """

    sites: ClassVar[tuple[str, ...]] = ()
    stages: tuple[str, ...] = ()
    auxiliary: ClassVar[tuple[str, ...]] = ()
    boundaries: ClassVar[Mapping[str, str]] = {}
    row_sites: ClassVar[tuple[str, ...]] = ()
    is_transition: ClassVar[bool] = False

    @abstractmethod
    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        """Run the block."""

    @abstractmethod
    def macs(self, layout: Layout) -> dict[str, int]:
        """Multiply-accumulates per batch row, by site; what belongs to no site is under "rest"."""

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        """What the first sub-module reads: normed and modulated tokens; a probe, without side effects."""
        raise NotImplementedError(f"{type(self).__name__} has no modulated input")

    def modulated_in_macs(self, layout: Layout) -> int:
        """Multiply-accumulates per batch row of that probe: by default what belongs to no site, the modulation."""
        return self.macs(layout).get("rest", 0)

    def after(self, layout: Layout) -> Layout:
        """The layout of the streams it returns."""
        return layout


class Transition(Block):
    """Glue between blocks (pool, upsample, concatenate): may change the layout; not counted in L, never reused.

    rearranges: it only deals tokens to other streams, so that a range of blocks may end before it as well as after.
    """

    is_transition = True
    rearranges: ClassVar[bool] = False

    def macs(self, layout: Layout) -> dict[str, int]:
        return {"rest": 0}


class Backbone(nn.Module):
    """A Diffusion Transformer: embed, a flat list of blocks and transitions, head.

    Time reaches `embed` in the network's own units; `forward` takes the noise level t in [0, 1] and converts.
    frozen: its blocks are compiled with their weights as constants.
    """

    preset: BackboneConfig
    blocks: nn.ModuleList
    skips: Mapping[int, int] = {}
    missing: ClassVar[Mapping[str, str]] = {}
    checkpointing: bool = False
    frozen: bool = False

    @abstractmethod
    def prepare(self, condition: Condition) -> Memory:
        """What is independent of x and t, once per run and set of rows."""

    @abstractmethod
    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        """Tokens and context from x [B, C, H, W] and native time [B] or per token [B, N]."""

    @abstractmethod
    def head(self, streams: Streams, context: Context) -> Tensor:
        """The prediction, in the layout of x."""

    @abstractmethod
    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        """Random (x, t, condition) of the native size, for estimates and tests."""

    @abstractmethod
    def end_macs(self, layout: Layout) -> dict[str, int]:
        """Multiply-accumulates per batch row outside the blocks: "embed" and "head".

        A family may name apart "prepare", what a run does once, and "time", one time embedding.
        """

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The prediction for x at noise level t [B] in [0, 1]."""
        memory = self.prepare(condition or Condition())
        streams, context = self.embed(x, self.preset.time.native(t), memory)
        return self.head(self.run(streams, context), context)

    def run(
        self,
        streams: Streams,
        context: Context,
        over: range | None = None,
        waiting: dict[int, Streams] | None = None,
    ) -> Streams:
        """All blocks in order, or those at the flat positions `over`, long skips handed over, nothing attached.

        waiting: what the sources of long skips gave, by flat position; those that run here add theirs.
        """
        blocks, skips, sources = list(self.blocks), self.skips, set(self.skips.values())
        waiting = {} if waiting is None else waiting
        for i in range(len(blocks)) if over is None else over:
            given = self.handed(i, context)
            if i in skips:
                given = {**given, "skip": waiting[skips[i]].tokens}
            streams, _ = self.call(blocks[i], streams, context, None, given)
            if i in sources:
                waiting[i] = streams
        return streams

    def handed(self, position: int, context: Context) -> Mapping[str, Any]:
        """What was prepared for the block at a flat position alone, such as its keys and values of the text."""
        return NOTHING

    def call(
        self, block: nn.Module, streams: Streams, context: Context, plan: BlockPlan | None, given: Mapping[str, Any]
    ) -> tuple[Streams, dict[str, Any]]:
        """One block call, recomputed in the backward pass when `checkpointing` is on."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, streams, context, plan, given, use_reentrant=False)
        return block(streams, context, plan, given)

    @property
    def unread(self) -> bool:
        """Whether it has parameters, as published, whose output nothing reads: data parallelism must look for them."""
        return False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation (that of the parameters)."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def macs(self, layout: Layout) -> int:
        """Multiply-accumulates of one forward per batch row, counted from the modules and the layout."""
        total = sum(self.end_macs(layout).values())
        for block in cast("Sequence[Block]", self.blocks):
            total += sum(block.macs(layout).values())
            layout = block.after(layout)
        return total

    def grown_from(self, other: Backbone) -> Mapping[str, Tensor]:
        """The weights this network begins with when training starts from another: the other's own.

        A family that grows out of another one adds what it has besides.
        """
        return other.state_dict()

    def learned_parameters(self) -> int:
        """Number of trainable values (frozen position tables are buffers and not counted)."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def on_paper(config: BackboneConfig) -> tuple[Backbone, Layout]:
    """A network without its weights, on the meta device, and the layout of an input of its native size."""
    with torch.device("meta"):
        backbone = config.build()
    x, t, condition = backbone.example(1, "meta")
    streams, _ = backbone.embed(x, config.time.native(t), backbone.prepare(condition))
    return backbone, streams.layout


def check_size(x: Tensor, channels: int, patch: int, family: str, because: str = "its patch") -> None:
    """One clear sentence when x [B, C, H, W] does not fit: wrong rank, channels, or not a multiple of the patch."""
    if x.ndim != 4:
        raise UserError(f"{family} takes x of shape [batch, channels, height, width]; got {list(x.shape)}")
    if x.shape[1] != channels:
        raise UserError(f"{family} was built for {channels} channels; x has {x.shape[1]}")
    height, width = x.shape[2:]
    if height % patch or width % patch:
        fits = f"{height // patch * patch or patch}x{width // patch * patch or patch}"
        given = f"got {height}x{width}, try {fits}"
        raise UserError(f"{family} takes sizes that are multiples of {because}, {patch}; {given}")
