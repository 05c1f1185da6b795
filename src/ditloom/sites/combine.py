"""Which sets of handlers are legal, in which order they act, and a sentence why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Control, Handler, Steps, Tap
from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site
from ditloom.sites.codecs import Delta
from ditloom.sites.edits import EDITS, REPLACING
from ditloom.sites.surface import Surface
from ditloom.sites.visit import COSTLY

LEVELS = {"run": 0, "blocks": 1, "block": 2, "attention": 3}
WHOLE = frozenset({Action.COMPUTE, Action.REUSE, Action.DEFER})
"""Actions at a whole output or branch; a range may also be skipped, and everything happens inside blocks."""


def canonical(handlers: Sequence[Handler]) -> list[Handler]:
    """By key: the order in which the user wrote them does not matter. Where one encloses another, sites tell."""
    keys = [h.key for h in handlers]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"{key} is given twice; one run can hold a method once")
    return sorted(handlers, key=lambda handler: handler.key)


def check(
    handlers: Sequence[Handler],
    controls: Mapping[str, Sequence[Control]],
    plans: Mapping[str, Steps],
    taps: Mapping[str, Sequence[Sequence[Tap]]],
) -> None:
    """Raise `UserError` for an illegal set: two controllers of one place, or two replacements of one stage."""
    for handler in handlers:
        _check_controls(handler, controls[handler.key], plans[handler.key])
    for first, second in combinations([h.key for h in handlers], 2):
        _check_plans(first, second, plans[first], plans[second])
        _check_replaced(first, second, taps[first], taps[second])


def _check_controls(handler: Handler, controls: Sequence[Control], plan: Steps) -> None:
    known = {c.site for c in controls}
    if len({c.site.label for c in controls}) < len(controls):
        raise ValueError(f"{handler.key} controls a site twice: {[c.site.label for c in controls]}")
    for control in controls:
        if control.site.level == "block" and isinstance(control.codec, Delta):
            raise ValueError(f"{handler.key} stores a change at {control.site}: inside a block, store the value")
    for step, actions in enumerate(plan):
        for site, action in actions.items():
            if site not in known:
                raise ValueError(f"{handler.key} plans {site} at step {step} without a control for it")
            if not _possible(site, action):
                raise ValueError(f"{handler.key} plans {action} at {site}, where that is not possible")
            if action is Action.DEFER:
                _check_probes(handler, site)


def _possible(site: Site, action: Action) -> bool:
    if site.level == "block":
        return action is not Action.ROWS or site.rows
    return action in WHOLE or (action is Action.SKIP and site.span is not None)


def _check_probes(handler: Handler, site: Site) -> None:
    """A decision can only look at what is known where it is taken."""
    start = site.span[0] if site.span is not None else site.block
    for probe in handler.probes(site):
        if start is None or max(probe.block, *probe.span) > start:
            raise ValueError(f"{handler.key} decides at {site} by {probe}, which is not known there")


def _check_plans(first: str, second: str, a: Steps, b: Steps) -> None:
    for step, (mine, yours) in enumerate(zip(a, b, strict=True)):
        clash = next(_clashes(_acting(mine), _acting(yours)), None)
        if clash is not None:
            raise UserError(
                f"{first} and {second} cannot run together: both control {_shared(*clash)} "
                f"at step {step}; give them windows that do not overlap"
            )


def _acting(actions: Mapping[Site, Action]) -> list[Site]:
    return [site for site, action in actions.items() if action is not Action.COMPUTE]


def _clashes(mine: Sequence[Site], yours: Sequence[Site]) -> Iterator[tuple[Site, Site]]:
    inside = {site.label: site for site in yours if site.level == "block"}
    yield from ((site, inside[site.label]) for site in mine if site.level == "block" and site.label in inside)
    outer = [site for site in yours if site.level != "block"]
    yield from ((a, b) for a in mine if a.level != "block" for b in outer if rivals(a, b))


def rivals(a: Site, b: Site) -> bool:
    """Two sites of one level that share something: one controller per site, window and branch."""
    if a.level != b.level:
        return False
    if a.level == "run":
        return None in (a.branch, b.branch) or a.branch == b.branch
    if a.span is not None and b.span is not None:
        return a.span[0] < b.span[1] and b.span[0] < a.span[1]
    return a.label == b.label


def _shared(a: Site, b: Site) -> str:
    return str(a) if a == b else f"{a} and {b}, which overlap,"


def _check_replaced(first: str, second: str, a: Sequence[Sequence[Tap]], b: Sequence[Sequence[Tap]]) -> None:
    for step, (mine, yours) in enumerate(zip(a, b, strict=True)):
        theirs = [tap for tap in yours if tap.op in REPLACING]
        for tap in (t for t in mine if t.op in REPLACING):
            if any(_same_place(tap, other) for other in theirs):
                raise UserError(
                    f"{first} and {second} cannot run together: both replace {tap.stage} of block {tap.block} at "
                    f"step {step}"
                )


def _same_place(a: Tap, b: Tap) -> bool:
    if (a.stage, a.block, a.stream) != (b.stage, b.block, b.stream):
        return False
    segments = a.segment is None or b.segment is None or a.segment == b.segment
    branches = a.branches is None or b.branches is None or bool({*a.branches} & {*b.branches})
    return segments and branches


def check_sites(controls: Mapping[str, Sequence[Control]], surface: Surface) -> None:
    """Refuse a control of a place that this model does not have, or whose output cannot be stored as asked."""
    for key, listed in controls.items():
        for control in listed:
            site = control.site
            if site.span is not None:
                surface.range(*site.span)
                if isinstance(control.codec, Delta) and not surface.keeps_layout(site):
                    raise UserError(
                        f"{key} cannot store the change over {site}: its tokens are laid out differently at both ends"
                    )
            elif site.level == "block" and site.inner not in surface.block(site.block or 0).sites:
                surface.require(site.kind, key)
                raise UserError(f"{key} needs the site {site}, which that block lacks")


def check_taps(taps: Mapping[str, Sequence[Sequence[Tap]]], surface: Surface) -> None:
    """Refuse a tap of a stage that this model does not have, or with an operation that is not possible there."""
    for key, listed in taps.items():
        for tap in dict.fromkeys(tap for step in listed for tap in step):
            reason = why_not(tap, surface)
            if reason:
                raise UserError(f"{key} cannot {tap.op} {tap.stage}: {reason}")


def why_not(tap: Tap, surface: Surface) -> str:
    """Why a tap is impossible on this model, or nothing."""
    if tap.block is None:
        return "" if tap.stage == "time_embedding" and tap.op == "capture" else "a tap needs a block"
    if not 0 <= tap.block < surface.blocks:
        return f"there is no block {tap.block}, this model has blocks 0..{surface.blocks - 1}"
    if not surface.has_stage(tap.stage, tap.block):
        family = surface.backbone.preset.family
        return surface.backbone.missing.get(tap.stage, f"block {tap.block} of {family} has no such stage")
    if tap.stage in COSTLY and tap.op != "capture":
        return "attention logits can only be captured"
    if (tap.op == "append") != (tap.stage == "attend"):
        return "keys and values are appended at the stage 'attend', and nothing else happens there"
    if tap.op == "append" and tap.branches is not None:
        return "appended keys are seen by every branch"
    if tap.op not in ("capture", "append") and tap.op not in EDITS:
        return f"known operations are {', '.join(EDITS)}"
    return ""
