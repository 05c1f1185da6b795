"""Handlers that do what is written out for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.clock import Clock, Rows, Schedule
from ditloom.contracts.method import Codec, Control, Handler, Steps
from ditloom.contracts.plan import Action
from ditloom.contracts.site import OUTPUT, Site, branch
from ditloom.sites.codecs import HOLD, VALUE
from ditloom.sites.surface import Surface
from tests.sites.walkthroughs import Gap


@dataclass
class Line:
    """Extrapolates linearly from the last values that there are; notes every history it was given."""

    depth: int = 1
    least: int = 1
    given: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    def __call__(self, history: Sequence[tuple[int, Any]], step: int) -> Any:
        self.given.append((step, tuple(s for s, _ in history)))
        return history[-1][1]


@dataclass
class Planned(Handler):
    """Controls some sites by a plan written out."""

    actions: Mapping[str, Sequence[Action]]
    predictor: Any = HOLD
    codec: Codec = VALUE
    key: str = "planned"

    def site(self, label: str, surface: Surface) -> Site:
        if label.startswith("range"):
            return surface.range(*(int(n) for n in label[6:-1].split(",")))
        if label in ("output", "branch(uncond)"):
            return OUTPUT if label == "output" else branch("uncond")
        kind, _, block = label[:-1].partition("(")
        return next(s for k in ("attn", "mlp") for s in surface.sites(k) if (s.inner, s.block) == (kind, int(block)))

    def controls(self, surface: Surface) -> Sequence[Control]:
        codecs = {label: Gap() if label.startswith("branch") else self.codec for label in self.actions}
        return [Control(self.site(label, surface), codecs[label], self.predictor) for label in self.actions]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        sites = {label: self.site(label, surface) for label in self.actions}
        return [{sites[k]: listed[s] for k, listed in self.actions.items()} for s in range(schedule.steps)]

    def rows(self, site: Site, clock: Clock, rows: Rows, memo: dict[str, Any]) -> Tensor:
        return torch.tensor([1, 4, 6, 11]).expand(rows.total, -1)

    def mix(self, site: Site, clock: Clock) -> Tensor:
        return torch.tensor(0.25)
