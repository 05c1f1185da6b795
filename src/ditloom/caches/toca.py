"""ToCa: Accelerating Diffusion Transformers with Token-wise Feature Caching (ICLR 2025, arXiv 2410.05317)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditloom.caches.amounts import at_least, check_share
from ditloom.caches.tokens import SCORES, Look, Score, look, spread
from ditloom.contracts.clock import Clock, Rows, Schedule
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.layout import Layout
from ditloom.contracts.method import Assets, Control, Handler, Method, Steps, Tap, Touch
from ditloom.contracts.plan import Action
from ditloom.contracts.registry import register
from ditloom.contracts.site import Site
from ditloom.sites.codecs import HOLD, VALUE
from ditloom.sites.surface import Surface


@register(
    "toca",
    paper="Token-wise Feature Caching (ToCa), arXiv 2410.05317",
    family="caches",
    plain="Between full steps repeats attention, and recomputes the feed-forward only for the most important tokens.",
)
@dataclass(frozen=True, kw_only=True)
class ToCa(Method):
    """Between full steps attentions are reused, and feed-forwards are computed for the most important tokens only.

    A token's score is what it receives of attention (L2-normalised over tokens) plus `age_weight` times the steps since
    it was computed, in intervals; the best one of every 2 x 2 window gains `bonus` of itself. The best k are computed
    afresh and written into what is stored. Taken once a step from the conditional rows, obeyed by every branch.

    With x the share of the run or of the blocks (x_step falls to 0 at the last step), k is the share
    ``ratio f(step_weight, x_step) f(layer_weight, x_block) 2.5`` of the tokens, f(w, x) = 1 + w - 2 w x. The interval
    becomes ``interval / f(0.4, x_step)``, and 2 for x_step in [0.2, 0.4). interval 1 and ratio 0 keep it as it is.

    score: "attention", "small-values" (DuCa's, which fused attention allows), "age". Text-to-image ToCa's entropy of
    the cross-attention is left out. Defaults: DiT-XL/2 at 50 DDIM steps.
    """

    interval: int = 3
    ratio: float = 0.07
    age_weight: float = 0.25
    bonus: float = 0.6
    step_weight: float = 2.0
    layer_weight: float = -0.2
    score: str = "attention"

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval)
        check_share(ratio=self.ratio)
        if self.score not in SCORES:
            raise UnknownName("score of tokens", self.score, SCORES)

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return (Touch("attn", "around"), Touch("mlp", "around"), Touch("logits", "capture"))

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        kind = SCORES[self.score]
        score = kind() if kind is not None else None
        if self.ratio:
            check_rows(surface, score)
        return TokenCache(self, score, surface.blocks)

    def cached(self, steps: int) -> list[bool]:
        """For every step whether it is no full one."""
        found, current = [], self.interval
        for index in reversed(range(steps)):
            full = index == steps - 1 or index % current == 0
            current = self.next_interval(index, steps) if full else current
            found.append(not full)
        return found

    def next_interval(self, index: int, steps: int) -> int:
        """The interval that a full step sets, `index` steps before the last."""
        if self.interval == 1 or self.ratio == 0:
            return self.interval
        sensitive = int(0.2 * steps) <= index < int(0.4 * steps)
        return 2 if sensitive else round(self.interval / tilted(0.4, index / steps))

    def fresh(self, block: int, blocks: int, clock: Clock, tokens: int) -> int:
        """How many tokens of a block are computed on a cached step."""
        by_step = tilted(self.step_weight, (clock.steps - 1 - clock.step) / clock.steps)
        by_layer = tilted(self.layer_weight, block / max(blocks - 1, 1))
        return int(min(max(self.ratio * by_step * by_layer * 2.5, 0.0), 1.0) * tokens)


def tilted(weight: float, x: float) -> float:
    """A line through 1 at x = 1/2."""
    return 1 + weight - 2 * weight * x


def check_rows(surface: Surface, score: Score | None) -> None:
    """Refuse a backbone that cannot compute some tokens alone, or that lacks what the score is made of."""
    family = surface.backbone.preset.family
    blocks = [site.block or 0 for site in surface.submodules if site.rows]
    if not blocks:
        raise UserError(f"toca computes a few tokens of a feed-forward alone, which the blocks of {family} cannot")
    if score is not None and not all(surface.has_stage(score.stage, block) for block in blocks):
        raise UserError(f"toca takes its score from {score.stage}, which {family} lacks: take score=age")


def layout_at(site: Site, surface: Surface) -> Layout:
    """Where tokens lie in a site's block."""
    return surface.layouts[surface.position(site.block or 0)]


@dataclass
class TokenCache(Handler):
    """Reuses attentions, computes some rows of feed-forwards.

    Its memo holds, by block, [samples, n] tensors: what every token received at the last full step, and the step it was
    computed at; and the tokens chosen for the present step.
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
        fresh = self.settings.fresh(site.block or 0, self.blocks, clock, tokens) if site.rows else 0
        return Action.COMPUTE if fresh == tokens else Action.ROWS if fresh else Action.REUSE

    def taps(self, schedule: Schedule, surface: Surface) -> Sequence[Sequence[Tap]]:
        """The score's stage at full steps, of blocks that choose tokens before the next one; and where tokens lie."""
        branch, full = Rows(schedule.branches, 1).leading, 0
        found: list[dict[tuple[str, int], Tap]] = [{} for _ in range(schedule.steps)]
        for step, actions in enumerate(self.plan(schedule, surface)):
            full = step if not actions else full
            for site in [site for site, action in actions.items() if action is Action.ROWS]:
                block, layout = site.block or 0, layout_at(site, surface)
                found[step]["block_in", block] = look("block_in", block, layout, branch)
                if self.score is not None:
                    stage = self.score.stage
                    found[full][stage, block] = look(stage, block, layout, branch)
        return [list(taps.values()) for taps in found]

    def noted(self, tap: Tap, value: Any, clock: Clock, rows: Rows, memo: dict[str, Any]) -> None:
        assert isinstance(tap, Look)
        notes = memo.setdefault(str(tap.block), {"place": tap})
        if self.score is not None and tap.stage == self.score.stage:
            notes["received"] = self.score(value, tap)
        elif "received" not in notes:
            notes["received"] = torch.zeros(value.shape[:2], device=value.device)

    def rows(self, site: Site, clock: Clock, rows: Rows, memo: dict[str, Any]) -> Tensor:
        notes = memo[str(site.block)]
        if notes.get("step") != clock.step:
            notes |= {"step": clock.step, "chosen": self._choose(notes, site, clock)}
        return notes["chosen"].repeat(len(rows.branches), 1)

    def _choose(self, notes: dict[str, Any], site: Site, clock: Clock) -> Tensor:
        """The tokens [samples, k] with the highest scores; notes that they are computed now."""
        received, settings = notes["received"], self.settings
        cached = settings.cached(clock.steps)[: clock.step + 1]
        full = len(cached) - 1 - cached[::-1].index(False)
        computed = notes.get("computed", torch.full_like(received, full)).clamp_min(full)
        age = (clock.step - 1 - computed) / settings.interval
        score = spread(received + settings.age_weight * age, notes["place"], settings.bonus)
        fresh = settings.fresh(site.block or 0, self.blocks, clock, received.shape[1])
        chosen = score.argsort(dim=1, descending=True, stable=True)[:, :fresh]
        notes["computed"] = computed.scatter(1, chosen, float(clock.step))
        return chosen
