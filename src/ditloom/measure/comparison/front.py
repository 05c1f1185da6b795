"""Arithmetic of a comparison: which sets no other one beats, and how many steps cost as much as a set."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (x, y), both the larger the better, that no other beats in one without losing in the
    other; by falling x. Of equal points the first stays."""
    front: list[int] = []
    best = float("-inf")
    for index in sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1], i)):
        if points[index][1] > best:
            front.append(index)
            best = points[index][1]
    return front


def matched_steps(macs: float, plain_macs: float, steps: int, evaluations: Callable[[int], int]) -> int | None:
    """The fewest steps whose plain run takes at least `macs`, where the plain run of `steps` steps takes
    `plain_macs`; None where only the plain run itself does.

    Rounded up, so that the control never has less to work with than the set it is held against.
    """
    each = plain_macs / evaluations(steps)
    allowed = macs * (1 - 1e-9)
    return next((n for n in range(1, steps) if evaluations(n) * each >= allowed), None)
