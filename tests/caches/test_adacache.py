"""AdaCache: the codebook's counting against a loop by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ditloom.caches.adacache import AdaCache
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import mean_change
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.streams import Context, Streams
from tests.caches.deciding import added, drawn, reused, subtract, waits
from tests.sites import toys
from tests.sites.driving import by_hand

BOOK = ((0.1, 4), (0.25, 3), (0.5, 2), (1.0, 1))


def adapted_by_hand(model: Any, settings: AdaCache) -> tuple[Any, list[int]]:
    """x and the computed steps."""
    notes: dict[str, Any] = {"until": 0}
    computed: list[int] = []
    middle = len(model.blocks) // 2

    def step(s: int, streams: Streams, context: Context) -> Streams:
        if s < notes["until"]:
            return added(streams, notes["change"])
        left = streams
        for b, block in enumerate(model.blocks):
            left, kept = block(left, context, BlockPlan(keep=("attn@image",)) if b == middle else None, {})
            if b == middle:
                now = kept["attn@image"][:2]
        rate = 1
        if computed:
            gap = s - computed[-1]
            rate = settings.rate(settings.scale * float(mean_change(now, notes["attn"])) / gap)
        notes.update(change=subtract(left, streams), attn=now, until=s + rate)
        computed.append(s)
        return left

    return by_hand(model, step), computed


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_the_codebook(name: str, scale: float) -> None:
    model, settings = toys.make(name), AdaCache(codebook=BOOK, scale=scale)
    expected, computed = adapted_by_hand(model, settings)
    x, run = drawn(settings, model)
    assert reused(run) == [s for s in range(6) if s not in computed]
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_these_distances_reach_several_rates() -> None:
    found = {tuple(adapted_by_hand(toys.make("dit"), AdaCache(codebook=BOOK, scale=s))[1]) for s in (0.5, 1.0, 3.0)}
    assert len(found) > 1


def test_rates() -> None:
    """Of the published codebook."""
    assert [AdaCache().rate(d) for d in (0.0, 0.04, 0.06, 0.08, 0.1, 0.5, 7.0)] == [12, 10, 8, 6, 4, 3, 3]


def test_guards_and_waits() -> None:
    model = toys.make("dit")
    _, run = drawn(AdaCache(max_consecutive=1), model)
    steps = reused(run)
    assert steps and all(b - a > 1 for a, b in zip(steps, steps[1:], strict=False))
    _, run = drawn(AdaCache(warmup=6), model)
    assert not reused(run)
    computed = 6 - len(reused(drawn(AdaCache(codebook=BOOK), model)[1]))
    assert waits(AdaCache(codebook=BOOK), model) <= computed - 1, "one after each computed step but the first"


def test_beyond_the_codebook_is_told() -> None:
    _, run = drawn(AdaCache(codebook=((1e-6, 4), (1e-5, 1))), toys.make("dit"))
    assert not reused(run) and "is beyond its codebook, which ends at 1e-05" in run.report.notes[0]


def test_refusals() -> None:
    with pytest.raises(UserError, match="ascending bounds"):
        AdaCache(codebook=((0.5, 3), (0.1, 2)))
    with pytest.raises(UserError, match="rates of at least 1"):
        AdaCache(codebook=((0.5, 0),))
