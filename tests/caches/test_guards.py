"""Guards: where a step must be computed, counted by hand; masks against the published ones."""

from __future__ import annotations

import pytest

from ditloom.caches.fbcache import FBCache
from ditloom.caches.guards import MASKS, Guards, stretched
from ditloom.contracts.clock import Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.plan import Action
from tests.caches.deciding import bound, drawn, reused
from tests.sites import toys
from tests.sites.driving import follow, start

FULL = {"slow": 18, "medium": 15, "fast": 11, "ultra": 8}


def schedule(steps: int) -> Schedule:
    times = tuple(1 - s / steps for s in range(steps + 1))
    return Schedule(times, times)


@pytest.mark.parametrize("name", FULL)
def test_presets_are_those_of_28_steps(name: str) -> None:
    """Counts of computed steps as cache-dit 1.5.3 states them."""
    assert sum(MASKS[name]) == 28 and sum(stretched(name, 28)) == FULL[name]
    flat = [i % 2 == 0 for i, n in enumerate(MASKS[name]) for _ in range(n)]
    assert list(stretched(name, 28)) == flat


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50, 100])
def test_masks_stretch(steps: int) -> None:
    for name in FULL:
        mask = stretched(name, steps)
        assert len(mask) == steps and mask[0] and mask[-1]
        if steps >= 20:
            assert abs(sum(mask) / steps - FULL[name] / 28) < 0.08


def test_what_is_allowed() -> None:
    ten = schedule(10)
    assert Guards().allowed(ten) == [True] * 10
    assert Guards(warmup=3, tail=0.2).allowed(ten) == [False] * 3 + [True] * 5 + [False] * 2
    assert Guards(start=0.25, end=0.5).allowed(ten) == [False] * 2 + [True] * 3 + [False] * 5
    assert Guards(start=0.95, end=0.45, unit="noise").allowed(ten) == [False] + [True] * 5 + [False] * 4
    assert Guards(mask="1/2/1/3/3").allowed(ten) == [False, *[True] * 2, False, *[True] * 3, *[False] * 3]


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"warmup": -1}, "warmup is a count of at least 0"),
        ({"tail": 1.5}, "tail is a count of at least 0 or a share"),
        ({"mask": "mediun"}, "did you mean 'medium'"),
        ({"mask": "0/3"}, "begins with computed steps"),
        ({"mask": "3/x"}, "counts computed and reusable steps in turn"),
        ({"unit": "steps"}, "unknown unit 'steps'"),
        ({"policy": "lazy"}, "unknown policy"),
        ({"start": 0.7, "end": 0.2}, "is empty"),
        ({"max_total": -2}, "max_total"),
    ],
)
def test_bad_guards(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Guards(**settings)  # type: ignore[arg-type]


def test_a_window_outside_the_schedule() -> None:
    with pytest.raises(UserError, match="the window 12 to 20 by index holds none of the 6 steps"):
        drawn(FBCache(start=12, end=20, unit="index"), toys.make("dit"))


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"warmup": 3}, [3, 4, 5]),
        ({"tail": 2}, [1, 2, 3]),
        ({"max_consecutive": 1}, [1, 3, 5]),
        ({"max_consecutive": 2}, [1, 2, 4, 5]),
        ({"max_total": 2}, [1, 2]),
        ({"mask": "1/2/1/1/1", "policy": "static", "threshold": 1e-9}, [1, 2, 4]),
        ({"mask": "1/2/1/1/1", "policy": "static", "threshold": 0.0}, [1, 2, 4]),
        ({"mask": "1/2/1/1/1"}, [1, 2, 4]),
        ({"mask": "1/2/1/1/1", "threshold": 1e-9}, []),
        ({"start": 2, "end": 4, "unit": "index"}, [2, 3]),
    ],
)
def test_a_guard_beats_the_policy(settings: dict[str, object], expected: list[int]) -> None:
    """A cache that would always reuse reuses just where it may."""
    model = toys.make("dit")
    _, run = drawn(FBCache(**{"threshold": 1e9, **settings}), model)  # type: ignore[arg-type]
    assert reused(run, range(1, 5)) == expected
    assert run.report.count("range", Action.REUSE) == 2 * len(expected)


@pytest.mark.parametrize("steps", [1, 2])
def test_one_and_two_steps(steps: int) -> None:
    model = toys.make("dit")
    run = start(model, [bound(FBCache(threshold=1e9), model)], steps)
    follow(run)
    assert reused(run) == list(range(1, steps))
