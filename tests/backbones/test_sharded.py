"""Every family trains in two processes, FSDP2 block by block and DDP, as it does in one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.backbones.tiny import TINY
from tests.backbones.two_shards import MODES
from tests.two_processes import run_as_two

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes, started once for all families, report."""
    path = tmp_path_factory.mktemp("shards") / "found.json"
    run_as_two("tests.backbones.two_shards", path, timeout=900)
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", list(TINY))
def test_two_processes_train_as_one(found: dict[str, Any], name: str) -> None:
    assert found[name]["moved"] > 1e-2
    assert {mode: found[name][mode] for mode in MODES} == pytest.approx(dict.fromkeys(MODES, 0.0), abs=5e-4)
