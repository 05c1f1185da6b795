"""PAB: Real-Time Video Generation with Pyramid Attention Broadcast (arXiv 2408.12588)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from ditloom.caches.amounts import at_least
from ditloom.caches.static import Reuse, StaticCache, between
from ditloom.contracts.clock import Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets, Handler, Method, Touch
from ditloom.contracts.registry import register
from ditloom.contracts.site import Site
from ditloom.sites.surface import Surface

KINDS = {"spatial": "attn", "temporal": "temporal", "cross": "cross"}


@register(
    "pab",
    paper="Real-Time Video Generation with Pyramid Attention Broadcast, arXiv 2408.12588",
    family="caches",
    plain="In the calm middle of the run, computes attention only every few steps and repeats it in between.",
)
@dataclass(frozen=True, kw_only=True)
class PyramidAttentionBroadcast(Method):
    """In the flat middle of a run each attention is computed every n-th step and broadcast to the others.

    The more stable a kind of attention, the further it is broadcast: cross > temporal > spatial (joint attention
    counts as spatial). Stored before the gate, so that the current gate applies; in Open-Sora and Latte the original
    keeps the value after it, old gate included, which was further from the plain run on both bundled models and is not
    offered. Steps are counted from the first one of the run, so that on entering the window an output may be reused
    that was computed just outside.

    spatial, temporal, cross: each its n; at 1 it is never reused. low, high: noise levels strictly between which it
    happens. mlp_at: noise levels; at the step nearest to each, the feed-forwards of the first `mlp_blocks` blocks are
    computed, and the next `mlp_skip` steps reuse them (off by default, as in most of the published settings).
    """

    spatial: int = 2
    temporal: int = 4
    cross: int = 6
    low: float = 0.1
    high: float = 0.8
    mlp_at: tuple[float, ...] = ()
    mlp_blocks: int = 5
    mlp_skip: int = 2

    def __post_init__(self) -> None:
        at_least(1, spatial=self.spatial, temporal=self.temporal, cross=self.cross)
        at_least(1, mlp_blocks=self.mlp_blocks, mlp_skip=self.mlp_skip)
        between(self.low, self.high)

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return tuple(Touch(kind, "around") for kind in (*KINDS.values(), "mlp"))

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        asked = {kind: getattr(self, name) for name, kind in KINDS.items() if getattr(self, name) > 1}
        if asked and not any(surface.sites(kind) for kind in asked):
            surface.require(next(iter(asked)), "pab")
        if self.mlp_at and self.mlp_blocks > surface.blocks:
            raise UserError(f"pab reuses {self.mlp_blocks} feed-forwards, and this model has {surface.blocks} blocks")
        parts = [Reuse(partial(Surface.sites, kind=kind), partial(self.broadcast, n)) for kind, n in asked.items()]
        table = [Reuse(self.feed_forwards, self.by_table)] if self.mlp_at else []
        return StaticCache("pab", [*parts, *table])

    def broadcast(self, n: int, schedule: Schedule) -> Iterable[int]:
        """The steps that reuse an attention of range n."""
        inside = between(self.low, self.high)
        return [s for s in range(schedule.steps) if s % n and inside(schedule.clock(s))]

    def feed_forwards(self, surface: Surface) -> Sequence[Site]:
        """Those of the first blocks."""
        return [site for site in surface.require("mlp", "pab") if (site.block or 0) < self.mlp_blocks]

    def by_table(self, schedule: Schedule) -> Iterable[int]:
        """The steps after each of the table's, which are computed themselves."""
        levels = schedule.times[:-1]
        computed = {min(range(schedule.steps), key=lambda s: abs(levels[s] - t)) for t in self.mlp_at}
        after = {s + k for s in computed for k in range(1, self.mlp_skip + 1) if s + k < schedule.steps}
        return sorted(after - computed)
