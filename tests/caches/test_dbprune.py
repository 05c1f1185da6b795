"""DBPrune: every block's decision against a hand-written loop; what is protected; the relaxed threshold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ditloom.caches.dbprune import DBPrune
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import mean_change
from ditloom.contracts.streams import Context, Streams
from tests.caches.deciding import added, drawn, planning, subtract, waits
from tests.sites import toys
from tests.sites.driving import STEPS, by_hand, by_run, same


def pruned_by_hand(model: Any, threshold: float, first: int, warmup: int, relax: float = 0.0) -> tuple[Any, set[Any]]:
    """x, and the (step, block) cells that were reused."""
    notes: dict[int, dict[str, Any]] = {}
    cells: set[tuple[int, int]] = set()

    def step(s: int, streams: Streams, context: Context) -> Streams:
        told: list[float] = []
        for b, block in enumerate(model.blocks):
            now, mine = streams["image"][:2], notes.setdefault(b, {})
            if s >= warmup and b >= first and "reference" in mine:
                relaxed = relax * sum(told[:5]) / len(told[:5]) if told else 0.0
                limit = max(threshold, relaxed) if relaxed < 2 * threshold else threshold
                told.append(float(mean_change(now, mine["reference"])))
                if told[-1] < limit:
                    cells.add((s, b))
                    streams = added(streams, mine["change"])
                    continue
            left, _ = block(streams, context, None, {})
            mine.update(reference=now, change=subtract(left, streams))
            streams = left
        return streams

    return by_hand(model, step), cells


@pytest.mark.parametrize("threshold, relax", [(0.15, 0.0), (0.2, 0.0), (0.15, 1.25), (0.4, 0.0)])
@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_decisions(name: str, threshold: float, relax: float) -> None:
    model = toys.make(name)
    x, cells = pruned_by_hand(model, threshold, 1, 2, relax)
    got, run = drawn(DBPrune(first=1, warmup=2, threshold=threshold, relax=relax), model)
    assert {cell for cell, share in run.report.cells.items() if share == 1.0} == cells
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)


def test_these_thresholds_decide_both_ways() -> None:
    """Also within one step."""
    cells = pruned_by_hand(toys.make("mmdit"), 0.15, 1, 2)[1]
    assert cells and (5, 3) not in cells and (5, 2) in cells
    assert pruned_by_hand(toys.make("mmdit"), 0.15, 1, 2, relax=1.25)[1] != cells


def test_protected_blocks_always_run() -> None:
    _, run = drawn(DBPrune(first=1, last=2, warmup=1, threshold=1e9), toys.make("dit"))
    assert {block for _, block in run.report.cells} == {1, 2}


def test_blocks_at_a_long_skip_always_run() -> None:
    """Of five blocks with skips 0-4 and 1-3 only the middle one is free."""
    _, run = drawn(DBPrune(first=0, warmup=1, threshold=1e9), toys.make("u-vit"))
    assert {block for _, block in run.report.cells} == {2}


def test_threshold_zero_is_off() -> None:
    model = toys.make("dit")
    x, run = drawn(DBPrune(first=0, threshold=0.0), model)
    assert same(x, by_run(model)[0]) and run.report.macs - planning(run) == run.report.full_macs


def test_two_token_tensors_a_block() -> None:
    """The change of both branches, and the leading one's input: one and a half of a batched forward."""
    _, run = drawn(DBPrune(first=1, warmup=0, threshold=0.1), toys.make("dit"))
    tokens = 4 * 16 * 64 * 4
    assert run.report.bytes_held == 4 * (tokens + tokens // 2)


def test_one_wait_a_decision() -> None:
    model = toys.make("dit")
    assert waits(DBPrune(first=1, warmup=2, threshold=0.1), model) == 4 * (STEPS - 2)


def test_refusals() -> None:
    with pytest.raises(
        UserError, match="the first 8 and the last 0 blocks and those at a long skip: of this model's 5"
    ):
        drawn(DBPrune(), toys.make("dit"))
    with pytest.raises(UserError, match="first is a whole number of at least 0"):
        DBPrune(first=-1)
