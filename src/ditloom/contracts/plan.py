"""What happens inside one block on one call: small, frozen, hashable, so that it is a compile-time constant."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    """What an executor does at a site."""

    COMPUTE = "compute"
    REUSE = "reuse"
    ROWS = "rows"
    MIX = "mix"
    SKIP = "skip"
    DEFER = "defer"


@dataclass(frozen=True)
class Edit:
    """A registered edit of one stage: its operation, where its tensor is found in `given`, and to what it applies.

    stream: the token stream; segment: one segment of it, or all of it. number: a static parameter of the operation
    (the weight of a lerp, the source row of copy-rows).
    """

    stage: str
    op: str
    key: str = ""
    stream: str = "image"
    segment: str | None = None
    number: float = 0.0


@dataclass(frozen=True)
class BlockPlan:
    """The plan of one block call: actions at its sites, stages to capture, edits to apply, the attention kernel.

    `keep` lists sites and stages whose tensors go out in `kept`; "stage@stream" limits one to a stream.
    """

    actions: tuple[tuple[str, Action], ...] = ()
    keep: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = ()
    attend: str = ""

    def action(self, site: str) -> Action:
        """The action at a site of this block; COMPUTE where nothing is planned."""
        for name, action in self.actions:
            if name == site:
                return action
        return Action.COMPUTE


PLAIN = BlockPlan()
