"""ToCa: Accelerating Diffusion Transformers with Token-wise Feature Caching (ICLR 2025, arXiv 2410.05317)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ditloom.caches.amounts import at_least, check_share
from ditloom.caches.token_cache import TokenCache, check_rows
from ditloom.caches.tokens import SCORES
from ditloom.contracts.clock import Clock
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.method import Assets, Handler, Method, Touch
from ditloom.contracts.registry import register
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
    it was computed, in intervals; the best one of every `window` x `window` gains `bonus` of itself. The best k are
    computed afresh and written into what is stored. Taken once a step, obeyed by every branch.

    With x the share of the run or of the blocks (x_step falls to 0 at the last step), k is the share
    ``ratio f(step_weight, x_step) f(layer_weight, x_block) feed_forward`` of the tokens, f(w, x) = 1 + w - 2 w x; for a
    cross-attention with `cross` in place of feed_forward (0: reused). The interval becomes
    ``interval / f(interval_weight, x_step)``, and 2 for x_step in `sensitive`. interval 1 and ratio 0 keep it as it is.
    Intervals are counted from the last step, which is full; with `forward` from the first.

    score: "attention"; "text", the entropy of the attention to the text (of all branches, for models with
    cross-attention); "small-values" (DuCa's, which fused attention allows); "age". Defaults: DiT-XL/2 at 50 DDIM steps.
    preset:toca-text is PixArt's, with two differences: a step on which the new interval begins is full in all blocks
    (there in the first one alone), and feed-forwards choose by the maps of text as they were before the step.
    """

    interval: int = 3
    ratio: float = 0.07
    age_weight: float = 0.25
    bonus: float = 0.6
    window: int = 2
    step_weight: float = 2.0
    layer_weight: float = -0.2
    interval_weight: float = 0.4
    sensitive: tuple[float, ...] = (0.2, 0.4)
    feed_forward: float = 2.5
    cross: float = 0.0
    forward: bool = False
    score: str = "attention"

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval, window=self.window)
        check_share(ratio=self.ratio)
        if self.score not in SCORES:
            raise UnknownName("score of tokens", self.score, SCORES)
        if len(self.sensitive) not in (0, 2):
            raise UserError(f"sensitive is two shares of the run, such as (0.2, 0.4), or (); got {self.sensitive}")

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        around = tuple(Touch(kind, "around") for kind in ("attn", "cross", "mlp"))
        return (*around, Touch("logits", "capture"), Touch("cross_logits", "capture"))

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        kind = SCORES[self.score]
        score = kind() if kind is not None else None
        if self.ratio:
            check_rows(self, surface, score)
        return TokenCache(self, score, surface.blocks)

    def cached(self, steps: int) -> list[bool]:
        """For every step whether it is no full one."""
        found, current = [], self.interval
        for step in range(steps):
            full = step == 0 or (step if self.forward else steps - 1 - step) % current == 0
            current = self.next_interval(step, steps) if full else current
            found.append(not full)
        return found

    def next_interval(self, step: int, steps: int) -> int:
        """The interval that a full step sets."""
        if self.interval == 1 or self.ratio == 0:
            return self.interval
        low, high = (int(share * steps) for share in self.sensitive or (0, 0))
        if low <= steps - 1 - step < high:
            return 2
        return round(self.interval / tilted(self.interval_weight, self._left(step, steps)))

    def fresh(self, block: int, blocks: int, clock: Clock, tokens: int, kind: str = "mlp") -> int:
        """How many tokens of a block are computed on a cached step."""
        by_step = tilted(self.step_weight, self._left(clock.step, clock.steps))
        by_layer = tilted(self.layer_weight, block / max(blocks - 1, 1))
        return int(min(max(self.ratio * by_layer * by_step * self.part(kind), 0.0), 1.0) * tokens)

    def part(self, kind: str) -> float:
        """How much more, or less, of a kind of site is computed."""
        return {"mlp": self.feed_forward, "cross": self.cross}.get(kind, 0.0)

    def _left(self, step: int, steps: int) -> float:
        """The share of a run that is left."""
        return (steps - step - (not self.forward)) / steps


def tilted(weight: float, x: float) -> float:
    """A line through 1 at x = 1/2."""
    return 1 + weight - 2 * weight * x
