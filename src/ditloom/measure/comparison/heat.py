"""What a run computed, reused, predicted or left out, step by step and block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site
from ditloom.sites.codecs import Hold
from ditloom.sites.program import Program
from ditloom.sites.report import Report

COMPUTED, REUSED, PREDICTED, PARTLY, LEFT_OUT = ".", "r", "p", "w", "x"
RANK = {COMPUTED: 0, LEFT_OUT: 1, PARTLY: 2, REUSED: 3, PREDICTED: 4}
"""Of several things done to one block on one step, the highest names the cell."""


@dataclass
class Recorder(Report):
    """A report that also remembers on which step a site was not computed; whoever drives the run says the step."""

    step: int = 0
    acted: list[tuple[int, Site, Action]] = field(default_factory=list)

    def visit(self, site: Site, action: Action, times: int = 1) -> None:
        super().visit(site, action, times)
        if action is not Action.COMPUTE:
            self.acted.append((self.step, site, action))


@dataclass(frozen=True)
class Heat:
    """The map of one batch: `shares[step][block]` of the block's multiply-accumulates that were not executed, and how
    that came about, a letter a block in `kinds[step]`. branches: a letter a step for each guidance branch."""

    shares: tuple[tuple[float, ...], ...] = ()
    kinds: tuple[str, ...] = ()
    branches: Mapping[str, str] = field(default_factory=dict)

    @property
    def reused(self) -> float:
        """The mean over steps, blocks and branches of what was not computed."""
        if not self.shares:
            return 0.0
        steps = [self._of_step(step) for step in range(len(self.shares))]
        return sum(steps) / len(steps)

    def _of_step(self, step: int) -> float:
        gated = sum(letters[step] != COMPUTED for letters in self.branches.values()) / max(len(self.branches), 1)
        inside = sum(self.shares[step]) / max(len(self.shares[step]), 1)
        return gated + (1 - gated) * inside

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "shares": [list(row) for row in self.shares],
            "kinds": list(self.kinds),
            "branches": dict(self.branches),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Heat:
        """The inverse of `to_dict`."""
        return cls(tuple(tuple(row) for row in values["shares"]), tuple(values["kinds"]), dict(values["branches"]))


def heat(recorder: Recorder, program: Program | None, steps: int, blocks: int, branches: Sequence[str]) -> Heat:
    """The map of a finished run of `steps` steps; without a program nothing acted."""
    kinds = [[COMPUTED] * blocks for _ in range(steps)]
    gates = {branch: [COMPUTED] * steps for branch in branches}
    holds = _holding(program)
    for step, site, action in recorder.acted:
        letter = _letter(action, holds.get((step, site.label), True))
        if site.branch is not None:
            gates[site.branch][step] = letter
        for block in _blocks_of(site, blocks):
            kinds[step][block] = max(kinds[step][block], letter, key=RANK.__getitem__)
    shares = [[_share(recorder, step, block) for block in range(blocks)] for step in range(steps)]
    return Heat(
        tuple(tuple(row) for row in shares),
        tuple("".join(row) for row in kinds),
        {branch: "".join(letters) for branch, letters in gates.items()},
    )


def _holding(program: Program | None) -> dict[tuple[int, str], bool]:
    """Whether what is reused at a site on a step is the last value as it was, and not a prediction from it."""
    if program is None:
        return {}
    return {
        (step, planned.site.label): isinstance(planned.control.predictor, Hold)
        for step, planned_step in enumerate(program.steps)
        for planned in planned_step.planned()
    }


def _letter(action: Action, holds: bool) -> str:
    if action is Action.REUSE:
        return REUSED if holds else PREDICTED
    return LEFT_OUT if action is Action.SKIP else PARTLY


def _blocks_of(site: Site, blocks: int) -> range:
    if site.span is not None:
        return range(*site.span)
    if site.block is not None:
        return range(site.block, site.block + 1)
    return range(blocks) if site.branch is None else range(0)


def _share(recorder: Recorder, step: int, block: int) -> float:
    cells = recorder.cells
    return round(max(cells.get((step, block), 0.0), cells.get((step, -1), 0.0)), 4)
