"""With blocks compiled: the same result, no graph break, nothing compiled again, in full graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ditloom.caches.adacache import AdaCache
from ditloom.caches.dbcache import DBCache
from ditloom.caches.dbprune import DBPrune
from ditloom.caches.magcache import MagCache
from ditloom.caches.mixcache import MixCache
from ditloom.caches.taocache import TaoCache
from ditloom.caches.teacache import TeaCache
from ditloom.caches.toca import ToCa
from ditloom.contracts.clock import Clock
from ditloom.contracts.method import Method
from ditloom.sites.compiling import compile_blocks
from tests.caches.deciding import drawn
from tests.sites import toys
from tests.sites.driving import same

COUNTERS = torch._dynamo.utils.counters
METHODS: dict[str, Method] = {
    "teacache": TeaCache(threshold=0.4),
    "dbcache": DBCache(first=1, warmup=2, threshold=0.3, predictor="taylor"),
    "dbprune": DBPrune(first=1, warmup=2, threshold=0.2),
    "magcache": MagCache(threshold=0.15, ratios=(1.0, 1.1, 1.02, 1.01, 0.97, 0.9)),
    "adacache": AdaCache(),
    "mixcache": MixCache(kappa=1e9, stable=1),
    "taocache": TaoCache(start=0.0, alpha=0.7),
    "toca": ToCa(interval=4, ratio=0.1),
    "toca by age": ToCa(interval=4, ratio=0.2, score="age"),
    "toca of one token": ToCa(interval=6, ratio=0.06, layer_weight=0.0, step_weight=1.0),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    COUNTERS.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", METHODS)
def test_compiled(name: str) -> None:
    method: Any = METHODS[name]
    eager, plain = drawn(method, toys.make("dit"))
    model = toys.make("dit")
    compile_blocks(model, backend="eager")
    compiled, run = drawn(method, model)
    graphs = COUNTERS["stats"]["unique_graphs"]
    assert not COUNTERS["graph_break"] and run.report.cells == plain.report.cells
    assert run.program is not None and 1 <= graphs <= run.program.static_plans()
    torch.testing.assert_close(compiled, eager)
    again, _ = drawn(method, model)
    assert same(again, compiled) and COUNTERS["stats"]["unique_graphs"] == graphs, "compiled again"


@pytest.mark.parametrize("name", METHODS)
def test_what_is_held_was_foreseen(name: str) -> None:
    """The estimate before the run is no less than what is held in it, remembered probes among them."""
    for family in ("dit", "mmdit"):
        _, run = drawn(METHODS[name], toys.make(family))  # type: ignore[arg-type]
        tokens = run.program.surface.layout.length()  # type: ignore[union-attr]
        bound = run.program.bytes_needed(4, 4, tokens, 64, 4 * toys.latent(1).nbytes)  # type: ignore[union-attr]
        assert run.report.bytes_held <= bound, family


def test_any_number_of_tokens_is_one_graph() -> None:
    """A cache that computes some tokens of each block computes ever other numbers of them."""
    steps = [Clock(s, 6) for s in range(6)]
    method = ToCa(interval=4, ratio=0.1)
    numbers = {
        method.fresh(b, 5, steps[s], 16) for s, cached in enumerate(method.cached(6)) if cached for b in range(5)
    }
    model = toys.make("dit")
    compile_blocks(model, backend="eager")
    drawn(method, model)
    assert COUNTERS["stats"]["unique_graphs"] < len(numbers)
