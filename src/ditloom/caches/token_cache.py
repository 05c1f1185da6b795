"""Reuses attentions, and computes some tokens of other sites: the handler of ToCa."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditloom.caches.tokens import Look, Score, look, spread
from ditloom.contracts.clock import Clock, Rows, Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout
from ditloom.contracts.method import Control, Handler, Steps, Tap
from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site
from ditloom.sites.codecs import HOLD, VALUE
from ditloom.sites.surface import Surface

if TYPE_CHECKING:
    from ditloom.caches.toca import ToCa


def check_rows(settings: ToCa, surface: Surface, score: Score | None) -> None:
    """Refuse a backbone that cannot compute some tokens alone, or that lacks what the score is made of."""
    family = surface.backbone.preset.family
    blocks = [site.block or 0 for site in surface.submodules if site.rows and settings.part(site.kind)]
    if not blocks:
        raise UserError(f"toca computes a few tokens of a feed-forward alone, which the blocks of {family} cannot")
    if score is not None and not all(surface.has_stage(score.stage, block) for block in blocks):
        raise UserError(f"toca takes its score from {score.stage}, which {family} lacks: take score=age")


def layout_at(site: Site, surface: Surface) -> Layout:
    """Where tokens lie in a site's block."""
    return surface.layouts[surface.position(site.block or 0)]


@dataclass
class TokenCache(Handler):
    """Its memo holds, by block, what counts of every token [samples, n] in each branch, and where tokens lie; by site,
    the step at which each token was computed, and the tokens chosen for the present step.
    """

    settings: ToCa
    score: Score | None
    blocks: int
    key: str = "toca"

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(site, VALUE, HOLD) for site in surface.submodules]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        cached = self.settings.cached(schedule.steps)

        def at(clock: Clock) -> dict[Site, Action]:
            return {site: self._action(site, clock, layout_at(site, surface)) for site in surface.submodules}

        return [at(schedule.clock(s)) if cached[s] else {} for s in range(schedule.steps)]

    def _action(self, site: Site, clock: Clock, layout: Layout) -> Action:
        tokens = layout.length("image")
        fresh = self._fresh(site, clock, tokens) if site.rows else 0
        return Action.COMPUTE if fresh == tokens else Action.ROWS if fresh else Action.REUSE

    def _fresh(self, site: Site, clock: Clock, tokens: int) -> int:
        return self.settings.fresh(site.block or 0, self.blocks, clock, tokens, site.kind)

    def taps(self, schedule: Schedule, surface: Surface) -> Sequence[Sequence[Tap]]:
        """The score's stage at full steps, of blocks that choose tokens before the next one, and wherever it is made
        for some tokens anew; and where tokens lie.
        """
        leading, full = Rows(schedule.branches, 1).leading, 0
        every = self.score is not None and self.score.every_branch
        branches = schedule.branches if every else (leading,)
        found: list[dict[Any, Tap]] = [{} for _ in range(schedule.steps)]

        def note(step: int, stage: str, block: int, layout: Layout, branch: str) -> None:
            found[step][stage, block, branch] = look(stage, block, layout, branch)

        for step, actions in enumerate(self.plan(schedule, surface)):
            full = step if not actions else full
            for site in [site for site, action in actions.items() if action is not Action.REUSE]:
                block, layout = site.block or 0, layout_at(site, surface)
                note(step, "block_in", block, layout, leading)
                anew = [step] if every and site.kind == "cross" else []
                for at in [full, *anew] if self.score is not None else []:
                    for branch in branches:
                        note(at, self.score.stage, block, layout, branch)  # type: ignore[union-attr]
        return [list(taps.values()) for taps in found]

    def noted(self, tap: Tap, value: Any, clock: Clock, rows: Rows, memo: dict[str, Any]) -> None:
        assert isinstance(tap, Look)
        notes = memo.setdefault(str(tap.block), {"place": tap, "found": {}})
        if self.score is None or tap.stage != self.score.stage:
            notes.setdefault("like", torch.zeros(value.shape[:2], device=value.device))
            return
        (branch,) = tap.branches or ()
        now, before = self.score.of(value, tap), notes["found"].get(branch)
        if before is not None and now.shape != before.shape:
            now = before.scatter(1, memo[f"cross({tap.block})"]["chosen"], now)
        notes["found"][branch] = now

    def rows(self, site: Site, clock: Clock, rows: Rows, memo: dict[str, Any]) -> Tensor:
        notes = memo.setdefault(site.label, {})
        if notes.get("step") != clock.step:
            notes |= {"step": clock.step, "chosen": self._choose(memo[str(site.block)], notes, site, clock)}
        return notes["chosen"].repeat(len(rows.branches), 1)

    def _last_full(self, site: Site, clock: Clock, tokens: int) -> int:
        """The last step before on which all tokens of a site were computed."""
        cached, earlier = self.settings.cached(clock.steps), range(clock.step - 1, -1, -1)
        every = (s for s in earlier if self._fresh(site, replace(clock, step=s), tokens) == tokens or not cached[s])
        return next(every)

    def _choose(self, block: dict[str, Any], notes: dict[str, Any], site: Site, clock: Clock) -> Tensor:
        """The tokens [samples, k] with the highest scores; notes that they are computed now."""
        settings, found = self.settings, list(block["found"].values())
        matter = self.score.joined(found) if self.score is not None and found else torch.zeros_like(block["like"])
        full = self._last_full(site, clock, matter.shape[1])
        computed = notes.get("computed", torch.full_like(matter, full)).clamp_min(full)
        age = (clock.step - 1 - computed) / settings.interval
        score = spread(matter + settings.age_weight * age, block["place"], settings.bonus, settings.window)
        fresh = self._fresh(site, clock, matter.shape[1])
        chosen = score.argsort(dim=1, descending=True, stable=True)[:, :fresh]
        notes["computed"] = computed.scatter(1, chosen, float(clock.step))
        return chosen
