"""What becomes of a controlled site on each step, as far as a plan can know; and what must therefore be stored."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from ditloom.contracts.method import Predictor
from ditloom.contracts.plan import Action


class Fate(Enum):
    """NONE: not visited or left out. SURE: computed. MAYBE: computed unless an outer decision prevents it.
    USE: predicted from what is stored. BOTH: may use what is stored, and may add to it."""

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
    found, stored = [], 0
    for action, around in zip(actions, outer, strict=True):
        fate = OF_ACTION[action]
        if fate in USES and action is not Action.DEFER and stored < least(predictor):
            fate = Fate.SURE
        if around is Outer.PREVENTS:
            fate = Fate.NONE
        elif (around is Outer.FORBIDS and fate is not Fate.NONE) or (around is Outer.PERHAPS and fate is Fate.SURE):
            fate = Fate.MAYBE
        stored += fate in (Fate.SURE, Fate.MAYBE, Fate.BOTH)
        found.append(fate)
    return found


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
