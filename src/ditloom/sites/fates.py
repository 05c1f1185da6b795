"""What becomes of a controlled site on each step, as far as a plan can know; and what must therefore be stored."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from ditloom.contracts.method import Predictor
from ditloom.contracts.plan import Action


class Fate(Enum):
    """NONE: not visited, or left out. SURE: computed. MAYBE: computed unless an outer decision prevents it.
    USE: predicted from what is stored. BOTH: may use what is stored, and may add to it.
    """

    NONE = "none"
    SURE = "sure"
    MAYBE = "maybe"
    USE = "use"
    BOTH = "both"


USES = frozenset({Fate.USE, Fate.BOTH})
OF_ACTION = {
    Action.COMPUTE: Fate.SURE,
    Action.REUSE: Fate.USE,
    Action.SKIP: Fate.NONE,
    Action.DEFER: Fate.BOTH,
    Action.ROWS: Fate.BOTH,
    Action.MIX: Fate.BOTH,
}


class Outer(Enum):
    """What enclosing sites do to a site on a step: nothing, perhaps prevent it, surely prevent it, or forbid reuse."""

    FREE = 0
    PERHAPS = 1
    FORBIDS = 2
    PREVENTS = 3


def least(predictor: Predictor) -> int:
    """How many stored values a predictor needs: its `least` if it says so, else as many as it keeps."""
    return int(getattr(predictor, "least", predictor.depth))


def fates(actions: Sequence[Action], outer: Sequence[Outer], predictor: Predictor) -> list[Fate]:
    """A site's fate on every step. A reuse for which too little can have been stored is a computation."""
    found: list[Fate] = []
    for action, around in zip(actions, outer, strict=True):
        fate = OF_ACTION[action]
        if fate in USES and action is not Action.DEFER:
            fate = _backed(fate, found, least(predictor))
        if around is Outer.PREVENTS:
            fate = Fate.NONE
        elif (around is Outer.FORBIDS and fate is not Fate.NONE) or (around is Outer.PERHAPS and fate is Fate.SURE):
            fate = Fate.MAYBE
        found.append(fate)
    return found


def _backed(fate: Fate, before: Sequence[Fate], needed: int) -> Fate:
    """A planned use, given what the steps before have surely or possibly stored."""
    if sum(f in (Fate.SURE, Fate.MAYBE, Fate.BOTH) for f in before) < needed:
        return Fate.SURE
    return fate if before.count(Fate.SURE) >= needed else Fate.BOTH


def effect(fate: Fate, branch: bool, same_handler: bool) -> Outer:
    """What a site's fate does to the sites it encloses, or a branch's to everything inside the others."""
    if fate in (Fate.SURE, Fate.MAYBE):
        return Outer.FREE
    if not branch:
        return Outer.PERHAPS if fate is Fate.BOTH else Outer.PREVENTS
    return Outer.FORBIDS if fate is Fate.USE and not same_handler else Outer.PERHAPS


def needed_later(found: Sequence[Fate], step: int, depth: int) -> bool:
    """Whether what is stored by the end of `step` can still be used: before `depth` sure computations push it out."""
    computed = 0
    for fate in found[step + 1 :]:
        if fate in USES:
            return True
        computed += fate is Fate.SURE
        if computed >= depth:
            return False
    return False
