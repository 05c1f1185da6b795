"""The code of the page is run as it stands."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from ditloom.adapters.contract import Adapter
from ditloom.contracts.plan import Action
from ditloom.contracts.registries import ADAPTERS

PAGE = Path(__file__).parents[2] / "docs" / "how-to-adapt-a-model.md"
PIECES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def said() -> list[dict[str, Any]]:
    """The names after every piece."""
    names: dict[str, Any] = {}
    after = []
    for piece in PIECES:
        exec(compile(piece, str(PAGE), "exec"), names)
        after.append(dict(names))
    return after


def test_what_it_says_is_so(said: list[dict[str, Any]]) -> None:
    _, first, sites, guided = said
    assert 0 < first["run"].report.share_saved < 1
    assert first["run"].report.count("range", Action.REUSE) > 0
    for kind in ("attn", "mlp"):
        assert sites["run"].report.count(kind, Action.REUSE) == 6 * 2
    assert guided["run"].report.count("branch", Action.REUSE) > 0


def test_a_model_joins_in_ten_lines() -> None:
    adapter = PIECES[0][PIECES[0].index("class Mine(Adapter)") :]
    assert len([line for line in adapter.splitlines() if line.strip()]) <= 10
    assert issubclass(Adapter, object) and inspect.isabstract(Adapter)


def test_it_names_every_adapter() -> None:
    text = PAGE.read_text(encoding="utf-8").casefold()
    names = {"flux": "flux.1"}
    assert all(names.get(name, name.replace("-", "")) in text for name in ADAPTERS.names())
