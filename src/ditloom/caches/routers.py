"""Learned routers: a score for every step and sub-module; above a threshold it is computed, below it reused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditloom.contracts.clock import Clock, Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets, Control, Handler, Learned, Steps, Touch
from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site
from ditloom.sites.codecs import HOLD, VALUE
from ditloom.sites.surface import Surface

SCORES = "scores"
"""Name of the tensor [S, sites] in (0, 1) that training leaves; sites in the order of `Surface.submodules`."""


@dataclass(frozen=True, kw_only=True)
class Routed(Learned):
    """Settings of a cache whose plan was learned.

    threshold: scores above it are computed (0.1 as published). share: instead, compute this share of the sub-modules'
    MACs over the whole run, the highest scores first; 0 leaves it to the threshold.
    """

    threshold: float = 0.1
    share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(f"threshold is a score in 0..1; got {self.threshold}")
        if not 0 <= self.share <= 1:
            raise UserError(
                f"share is a share of the MACs in 0..1, where 0 leaves it to the threshold; got {self.share}"
            )

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return (Touch("attn", "around"), Touch("mlp", "around"))

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        found = self.learned(assets)
        assert found is not None
        key = type(self).__registration__.name
        scores = found.tensors[SCORES]
        if scores.shape[1] != len(surface.submodules):
            raise UserError(
                f"the routers of {key} know {scores.shape[1]} sub-modules and this model has {len(surface.submodules)}"
            )
        return MaskedCache(key, self.mask(scores, surface))

    def mask(self, scores: Tensor, surface: Surface) -> Tensor:
        """What is computed [S, sites], bool; the first step always is."""
        if not self.share:
            return computed(scores, self.threshold)
        return computed(scores, threshold_of(scores, self.share, costs_of(surface)))


def computed(scores: Tensor, threshold: float) -> Tensor:
    """Scores above the threshold, and the whole first step."""
    mask = scores > threshold
    mask[0] = True
    return mask


def costs_of(surface: Surface) -> Tensor:
    """MACs of every sub-module [sites], float64."""
    return torch.tensor([site.cost for site in surface.submodules], dtype=torch.float64)


def share_of(mask: Tensor, costs: Tensor) -> float:
    """The share of all sub-modules' MACs that a mask [S, sites] computes."""
    return float((mask * costs).sum() / (costs.sum() * len(mask)))


def threshold_of(scores: Tensor, share: float, costs: Tensor) -> float:
    """The threshold at which the first step and the highest scores of the others take `share` of all MACs, at most."""
    if share >= 1:
        return -1.0
    spread = costs.expand(scores.shape)
    left = share * float(spread.sum()) - float(costs.sum())
    order = scores[1:].flatten().argsort(descending=True)
    taken = int((spread[1:].flatten()[order].cumsum(0) <= left).sum())
    return float(scores[1:].flatten()[order[taken]]) if taken < len(order) else -1.0


class MaskedCache(Handler):
    """Reuses the outputs of sub-modules, before their gates, as a mask [S, sites] says, however old they are."""

    def __init__(self, key: str, mask: Tensor):
        self.key, self.mask = key, mask.tolist()

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(site, VALUE, HOLD) for site in surface.submodules]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        if len(self.mask) != schedule.steps:
            raise UserError(
                f"the routers of {self.key} were trained for {len(self.mask)} steps and this run has {schedule.steps}: "
                "train them for it, or draw with as many steps"
            )
        pairs = [list(zip(surface.submodules, row, strict=True)) for row in self.mask]
        return [{site: Action.REUSE for site, kept in row if not kept} for row in pairs]


class Gates(nn.Module, Handler):
    """Routers in training: y = score f(x) + (1 - score) stored, with score = sigmoid(logit) for step and sub-module.

    The mixed output replaces the stored one only where the score is above `threshold`, the rule of inference. active:
    the steps whose gates act; all others compute. Logits are drawn from N(0, 1).
    """

    key = "gates"

    def __init__(self, steps: int, sites: int, threshold: float, active: Sequence[int], seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.ParameterList(torch.randn(sites, generator=generator) for _ in range(steps))
        self.threshold, self.active = threshold, frozenset(active)

    @property
    def scores(self) -> Tensor:
        """Scores [S, sites]; 1 on steps without gates."""
        rows = [r.sigmoid() if s in self.active and s else torch.ones_like(r) for s, r in enumerate(self.logits)]
        return torch.stack(rows)

    @torch.no_grad()
    def clamp(self, limit: float = 5.0) -> None:
        """Keep every logit in [-limit, limit]."""
        for row in self.logits:
            row.clamp_(-limit, limit)

    def controls(self, surface: Surface) -> Sequence[Control]:
        self._column: Mapping[str, int] = {site.label: i for i, site in enumerate(surface.submodules)}
        self._above = (self.scores > self.threshold).tolist()
        return [Control(site, VALUE, HOLD) for site in surface.submodules]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        mixed = dict.fromkeys(surface.submodules, Action.MIX)
        return [mixed if step in self.active and step > 0 else {} for step in range(schedule.steps)]

    def mix(self, site: Site, clock: Clock) -> Tensor:
        return self.logits[clock.step][self._column[site.label]].sigmoid()

    def keeps_mixed(self, site: Site, clock: Clock) -> bool:
        return self._above[clock.step][self._column[site.label]]
