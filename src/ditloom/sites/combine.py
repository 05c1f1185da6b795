"""Which sets of handlers are legal, in which order they act, and a sentence why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Control, Handler, Steps, Tap
from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site
from ditloom.sites.surface import Surface

LEVELS = {"run": 0, "blocks": 1, "block": 2, "attention": 3}


def canonical(handlers: Sequence[Handler], surface: Surface) -> list[Handler]:
    """Outermost first, then by key: the order in which the user wrote them does not matter."""

    def rank(handler: Handler) -> tuple[int, str]:
        levels = [LEVELS[c.site.level] for c in handler.controls(surface)]
        return min(levels, default=len(LEVELS)), handler.key

    return sorted(handlers, key=rank)


def check(
    handlers: Sequence[Handler],
    controls: Mapping[str, Sequence[Control]],
    plans: Mapping[str, Steps],
    taps: Mapping[str, Sequence[Sequence[Tap]]],
) -> None:
    """Raise `UserError` for an illegal set: two controllers of one place, or two replacements of one stage."""
    keys = [h.key for h in handlers]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"{key} is given twice; one run can hold a method once")
        _check_controls(key, controls[key], plans[key])
    for first, second in combinations(keys, 2):
        _check_plans(first, second, plans[first], plans[second])
        _check_taps(first, second, taps[first], taps[second])


def _check_controls(key: str, controls: Sequence[Control], plan: Steps) -> None:
    known = {c.site for c in controls}
    for step, actions in enumerate(plan):
        for site in actions:
            if site not in known:
                raise ValueError(f"{key} plans {site} at step {step} without a control for it")


def _check_plans(first: str, second: str, a: Steps, b: Steps) -> None:
    for step, (mine, yours) in enumerate(zip(a, b, strict=True)):
        for site, action in mine.items():
            for other, reaction in yours.items():
                if Action.COMPUTE in (action, reaction):
                    continue
                if rivals(site, other):
                    raise UserError(
                        f"{first} and {second} cannot run together: both control {_shared(site, other)} "
                        f"at step {step}; give them windows that do not overlap"
                    )


def rivals(a: Site, b: Site) -> bool:
    """Two sites of one level that share something: one controller per site, window and branch."""
    if a.level != b.level:
        return False
    if a.level == "run":
        return a.kind != "step" and b.kind != "step" and (None in (a.branch, b.branch) or a.branch == b.branch)
    if a.span is not None and b.span is not None:
        return a.span[0] < b.span[1] and b.span[0] < a.span[1]
    return a.label == b.label


def _shared(a: Site, b: Site) -> str:
    return str(a) if a == b else f"{a} and {b}, which overlap"


def _check_taps(first: str, second: str, a: Sequence[Sequence[Tap]], b: Sequence[Sequence[Tap]]) -> None:
    for step, (mine, yours) in enumerate(zip(a, b, strict=True)):
        replaced = {_place(t) for t in mine if t.op == "replace"} & {_place(t) for t in yours if t.op == "replace"}
        if replaced:
            stage, block, *_ = next(iter(replaced))
            raise UserError(
                f"{first} and {second} cannot run together: both replace {stage} of block {block} at step {step}"
            )


def _place(tap: Tap) -> tuple[str, int | None, str, str | None]:
    return tap.stage, tap.block, tap.stream, tap.segment
