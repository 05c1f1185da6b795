"""Fewer steps: the control of every comparison, which saves computation without any cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ditloom.caches.amounts import at_least, check_share
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets, Handler, Method, Touch
from ditloom.contracts.registry import register
from ditloom.sites.surface import Surface


@register(
    "fewer-steps",
    paper="the control: the same sampler with fewer steps",
    family="caches",
    plain="No cache at all: the sampler takes fewer steps. What every cache has to beat.",
)
@dataclass(frozen=True, kw_only=True)
class FewerSteps(Method):
    """The same run in fewer steps, and nothing else: what a cache has to beat at equal cost.

    steps: how many. share: this part of the steps asked for, where `steps` is 0.
    """

    steps: int = 0
    share: float = 0.5

    def __post_init__(self) -> None:
        at_least(0, steps=self.steps)
        check_share(share=self.share)
        if not (self.steps or self.share):
            raise UserError("fewer-steps needs a number of steps or a share of them above 0")

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return ()

    def sampling(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """The number of steps, never more than were asked for and never none."""
        asked = int(settings["steps"])
        wanted = self.steps or max(1, int(self.share * asked + 0.5))
        if wanted > asked:
            raise UserError(f"fewer-steps takes {wanted} steps where {asked} are asked for: that is not fewer")
        return {"steps": wanted}

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        handler = Handler()
        handler.key = "fewer-steps"
        return handler
