"""The page on writing a cache: its code is run as it stands."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ditloom.contracts.errors import UserError
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.registries import METHODS
from ditloom.contracts.streams import Context, Streams
from tests.caches.acting import REUSE, bound, drawn
from tests.sites import toys
from tests.sites.driving import by_hand, by_run, loop, same

PAGE = Path(__file__).parents[2] / "docs" / "how-to-write-a-cache.md"
METHOD, USE = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The page's method, registered for the length of a test."""
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.setattr(METHODS, "_local", dict(METHODS._local))
    exec(compile(METHOD, str(PAGE), "exec"), module.__dict__)
    METHODS.add(module.MiddleFeedForwards)
    yield module


def test_it_is_one_short_file() -> None:
    assert len(METHOD.splitlines()) < 60


def test_it_does_what_it_says(page: ModuleType) -> None:
    """On steps 1, 3 and 5 the feed-forwards of blocks 1 to 3 are the stored ones."""
    model, stored = toys.make("dit"), {}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        def call(i: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
            if s % 2 and i in (1, 2, 3):
                return block(streams, context, BlockPlan((("mlp", REUSE),)), {**given, "mlp": stored[i]})
            streams, kept = block(streams, context, BlockPlan(keep=("mlp",)), given)
            stored[i] = kept["mlp"]
            return streams, kept

        return loop(model, streams, context, call)

    torch.testing.assert_close(drawn(model, "middle-feed-forwards")[0], by_hand(model, step), atol=1e-6, rtol=1e-6)
    assert same(drawn(model, "middle-feed-forwards:interval=1")[0], by_run(model)[0])
    with pytest.raises(UserError, match="this model has 5 blocks: none is left between 3 at either end"):
        bound("middle-feed-forwards:outer=3", model)


def test_its_use(page: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(USE, str(PAGE), "exec"), page.__dict__)
    assert re.match(r"[1-9]\d?% of the MACs saved", capsys.readouterr().out)
