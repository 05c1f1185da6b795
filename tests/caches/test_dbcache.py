"""DBCache: decisions against a hand-written loop, its equality with FBCache, what always runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ditloom.caches.dbcache import DBCache
from ditloom.caches.fbcache import FBCache
from ditloom.contracts.clock import Clock
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import mean_change
from ditloom.contracts.plan import Action
from ditloom.contracts.streams import Context, Streams
from tests.caches.deciding import ByHand, bound, drawn, first_residual, planning, reused, surface
from tests.sites import toys
from tests.sites.driving import STEPS, by_run, same


def by_rule(threshold: float, warmup: int, most: int) -> Any:
    def alike(s: int, before: Streams, entered: Streams, context: Context, notes: dict[str, Any]) -> bool:
        now, row = first_residual(before, entered), notes.get("row", 0)
        if s >= warmup and row < most and float(mean_change(now, notes["reference"])) < threshold:
            notes["row"] = row + 1
            return True
        notes["reference"], notes["row"] = now, 0
        return False

    return alike


@pytest.mark.parametrize("name, first, last", [("dit", 2, 1), ("mmdit", 1, 2), ("u-vit", 1, 1), ("u-vit", 2, 2)])
def test_decisions(name: str, first: int, last: int) -> None:
    """Warm-up and a cap among them; on long skips with a symmetric range."""
    model = toys.make(name)
    expected = ByHand(model, first, len(model.blocks) - last, by_rule(0.3, 2, 2))
    x = expected()
    got, run = drawn(DBCache(first=first, last=last, threshold=0.3, warmup=2, max_consecutive=2), model)
    assert reused(run) == expected.reused != []
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threshold", [0.25, 0.3, 0.4])
@pytest.mark.parametrize("name", ["dit", "mmdit", "u-toy"])
def test_one_first_block_is_fbcache(name: str, threshold: float) -> None:
    model = toys.make(name)
    x, run = drawn(DBCache(first=1, threshold=threshold, warmup=0), model)
    y, other = drawn(FBCache(threshold=threshold), model)
    assert same(x, y) and run.report.cells == other.report.cells


def test_a_reused_step_runs_the_first_and_the_last_blocks() -> None:
    model = toys.make("dit")
    _, run = drawn(DBCache(first=2, last=1, threshold=1.0, warmup=1), model)
    assert reused(run, (2, 3)) == list(range(1, STEPS))
    assert {block for _, block in run.report.cells} == {2, 3}


def test_thresholds_at_the_ends() -> None:
    """1 and above always reuse, 0 never."""
    model = toys.make("dit")
    assert reused(drawn(DBCache(first=1, threshold=1.0, warmup=0), model)[1]) == list(range(1, STEPS))
    x, run = drawn(DBCache(first=1, threshold=0.0, warmup=0), model)
    assert same(x, by_run(model)[0]) and run.report.macs - planning(run) == run.report.full_macs


def test_a_mask_of_ones_is_uncached() -> None:
    model = toys.make("dit")
    x, run = drawn(DBCache(first=1, threshold=1.0, warmup=0, mask="6", policy="static"), model)
    assert same(x, by_run(model)[0]) and not reused(run)


def test_an_accumulated_limit() -> None:
    model = toys.make("dit")
    limited = drawn(DBCache(first=1, threshold=1.0, warmup=0, max_accumulated=0.5), model)[1]
    assert 0 < len(reused(limited)) < STEPS - 1


def test_a_forecast_of_the_change_stays_closer_in_a_smooth_part() -> None:
    """Every second step reused, by a mask: the same steps for both."""
    model = toys.make("dit")
    plain = by_run(model)[0]
    settings: Any = {"first": 1, "warmup": 3, "mask": "3/1/1/1", "policy": "static"}
    held, run = drawn(DBCache(**settings), model)
    forecast, other = drawn(DBCache(**settings, predictor="taylor:order=1"), model)
    assert reused(run) == reused(other) == [3, 5]
    assert (forecast - plain).norm() < (held - plain).norm()


def golden_residuals() -> list[torch.Tensor]:
    """Twenty residuals [1, 8, 8] that settle down and then swing, by formula."""
    at = torch.arange(64, dtype=torch.float64).reshape(1, 8, 8)
    decay = [2.7 * torch.exp(torch.tensor(-s / 4, dtype=torch.float64)) for s in range(20)]
    return [(torch.sin(0.37 * at + d) + 0.15 * torch.cos(0.11 * at * s)).float() for s, d in enumerate(decay)]


MASK = "6/2/2/2/2/2/2/1/1"


@pytest.mark.parametrize(
    "settings, computed",
    [
        ({"threshold": 0.15}, [*range(20)]),
        ({"threshold": 0.2}, [*range(8), 9, 11, 14, 19]),
        ({"threshold": 0.3}, [0, 1, 2, 3, 5, 7, 11]),
        ({"threshold": 0.3, "warmup": 4, "max_consecutive": 2}, [0, 1, 2, 3, 5, 7, 10, 13, 16, 19]),
        ({"threshold": 0.3, "warmup": 2, "max_total": 5}, [0, 1, 2, 3, 5, 7, *range(11, 20)]),
        ({"threshold": 0.3, "max_accumulated": 3.0}, [0, 1, 2, 3, 5, 7, *range(10, 20)]),
        ({"threshold": 0.2, "warmup": 2, "mask": MASK}, [*range(10), 11, 12, 13, 16, 17, 19]),
        ({"threshold": 0.12, "warmup": 2, "mask": MASK, "policy": "static"}, [*range(6), 8, 9, 12, 13, 16, 17, 19]),
    ],
)
def test_golden_decisions(settings: dict[str, Any], computed: list[int]) -> None:
    """Steps that the context manager of cache-dit 1.5.3 computed when it was shown these residuals."""
    model = toys.make("dit")
    handler = bound(DBCache(**{"first": 1, "warmup": 0, **settings}), model)
    site, memo, found = surface(model).range(1, 5), {}, []  # type: ignore[var-annotated]
    (probe,) = handler.probes(site)
    for s, residual in enumerate(golden_residuals()):
        clock = Clock(s, 20)
        if handler.decide(site, {probe: residual}, clock, bool(found), memo) is Action.COMPUTE:
            found.append(s)
    assert found == computed


def test_refusals() -> None:
    with pytest.raises(UserError, match="first 8 and the last 0 blocks, and this model has 5: nothing"):
        drawn(DBCache(), toys.make("dit"))
    with pytest.raises(UserError, match=r"range\(1,5\) cannot be reused: the long skip"):
        drawn(DBCache(first=1), toys.make("u-vit"))
    with pytest.raises(UserError, match="first is a whole number of at least 1"):
        DBCache(first=0)
