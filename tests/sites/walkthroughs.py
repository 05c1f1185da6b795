"""Small handlers, one per walk-through: the ways published methods act, reduced to their rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ditloom.contracts.clock import Clock, Rows, Schedule, Window
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.method import Control, Handler, Probe, Steps, Tap, mean_change
from ditloom.contracts.plan import Action
from ditloom.contracts.site import OUTPUT, Site, branch
from ditloom.sites.codecs import DELTA, HOLD, VALUE
from ditloom.sites.rules import Padding, Rule, Term
from ditloom.sites.surface import Surface


@dataclass
class FirstBlockCache(Handler):
    """Reuse the change of all blocks after the first while the first block's own change stays alike."""

    threshold: float
    first: int = 1
    last: int = 0
    key: str = "first-block-cache"

    def site(self, surface: Surface) -> Site:
        return surface.range(self.first, surface.blocks - self.last)

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(self.site(surface), DELTA, HOLD)]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        return [{self.site(surface): Action.DEFER} for _ in range(schedule.steps)]

    def probes(self, site: Site) -> Sequence[Probe]:
        return (Probe("residual", span=(0, self.first)),)

    def decide(self, site: Site, probes: Mapping[Probe, Tensor], clock: Clock, ready: bool, memo: Any) -> Action:
        (residual,) = probes.values()
        if ready and float(mean_change(residual, memo["residual"])) < self.threshold:
            return Action.REUSE
        memo["residual"] = residual
        return Action.COMPUTE


@dataclass
class Broadcast(Handler):
    """Inside a window, compute an in-block site every n-th step and reuse it on the others."""

    every: int
    window: Window = Window()
    kind: str = "attn"
    key: str = "broadcast"

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(site, VALUE, HOLD) for site in surface.require(self.kind, self.key)]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        def at(s: int) -> Mapping[Site, Action]:
            reuse = s % self.every and self.window.contains(schedule.clock(s))
            return dict.fromkeys(surface.sites(self.kind), Action.REUSE) if reuse else {}

        return [at(s) for s in range(schedule.steps)]


@dataclass
class SomeRows(Handler):
    """On odd steps compute the MLP of the first k tokens only and keep the stored output of the others."""

    tokens: int
    key: str = "some-rows"

    def sites(self, surface: Surface) -> list[Site]:
        return [site for site in surface.require("mlp", self.key) if site.rows]

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(site, VALUE, HOLD) for site in self.sites(surface)]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        return [dict.fromkeys(self.sites(surface), Action.ROWS) if s % 2 else {} for s in range(schedule.steps)]

    def rows(self, site: Site, clock: Clock, rows: Rows, memo: dict[str, Any]) -> Tensor:
        return torch.arange(self.tokens).expand(rows.total, -1)


@dataclass
class Inject(Handler):
    """Keys and values of the image stream of row 0 go to the other rows (of some branches), in some blocks."""

    blocks: tuple[int, ...]
    branches: tuple[str, ...] | None = None
    key: str = "inject"

    def taps(self, schedule: Schedule, surface: Surface) -> Sequence[Sequence[Tap]]:
        stages = [(b, stage) for b in self.blocks for stage in ("k_proj", "v_proj")]
        return [[Tap(stage, b, "copy-rows", branches=self.branches) for b, stage in stages]] * schedule.steps

    def provide(self, tap: Tap, clock: Clock, rows: Rows) -> Tensor:
        return torch.arange(rows.total) > 0


@dataclass
class Added(Handler):
    """A condition image as a segment at its own clean time, by default static."""

    image: Tensor
    static: bool = True
    key: str = "added"

    def segments(self, clock: Clock, rows: Rows) -> Sequence[Segment]:
        return (Segment("condition", self.image, modulation="zero", static=self.static),)


@dataclass
class Regional(Handler):
    """A mix of two attentions with gates: where the gate is 1 without the masked text, elsewhere with it."""

    gate: Tensor
    hidden: Tensor
    key: str = "regional"

    def rule(self, layout: Layout, clock: Clock, rows: Rows) -> tuple[Rule, Mapping[str, Tensor]]:
        keep = ~self.hidden.expand(rows.total, -1)
        gate = self.gate.expand(rows.total, -1)
        gates = {"first": gate, "second": 1 - gate, "seen": keep}
        masked = Padding("text" if "text" in layout else "image", "seen")
        return Rule((Term((masked,), "first"), Term((), "second"))), gates


@dataclass
class Captures(Handler):
    """Everything its taps see, by tap."""

    wanted: Sequence[Tap]
    seen: dict[Tap, list[Any]] = field(default_factory=dict)
    key: str = "captures"

    def taps(self, schedule: Schedule, surface: Surface) -> Sequence[Sequence[Tap]]:
        return [self.wanted] * schedule.steps

    def captured(self, tap: Tap, value: Any, clock: Clock, rows: Rows) -> None:
        self.seen.setdefault(tap, []).append(value)


class LearnedGate(nn.Module, Handler):
    """A router per site: y = score * computed + (1 - score) * stored, in training."""

    key = "gate"

    def __init__(self, sites: int, score: float = 0.5):
        super().__init__()
        self.logits = nn.Parameter(torch.full((sites,), score).logit())

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(site, VALUE, HOLD) for site in surface.sites("attn")]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        return [dict.fromkeys(surface.sites("attn"), Action.MIX) for _ in range(schedule.steps)]

    def mix(self, site: Site, clock: Clock) -> Tensor:
        return self.logits[site.block or 0].sigmoid()


@dataclass
class SkipBlock(Handler):
    """Leave one block out."""

    block: int
    key: str = "skip-block"

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(surface.range(self.block, self.block + 1), VALUE, HOLD)]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        return [{surface.range(self.block, self.block + 1): Action.SKIP}] * schedule.steps


@dataclass(frozen=True)
class Gap:
    """Stores y - x of the guidance branches."""

    def encode(self, x: Tensor, y: Tensor) -> Tensor:
        return y - x

    def decode(self, x: Tensor, z: Tensor) -> Tensor:
        return x + z


@dataclass
class GuidanceGate(Handler):
    """From a step on, the unconditional branch is the conditional one plus the stored gap."""

    start: int
    key: str = "guidance-gate"

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(branch("uncond"), Gap(), HOLD)]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        return [{branch("uncond"): Action.REUSE} if s >= self.start else {} for s in range(schedule.steps)]


@dataclass
class HoldOutput(Handler):
    """Reuse the whole output on the given steps."""

    steps: tuple[int, ...]
    key: str = "hold-output"

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(OUTPUT, VALUE, HOLD)]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        return [{OUTPUT: Action.REUSE} if s in self.steps else {} for s in range(schedule.steps)]
