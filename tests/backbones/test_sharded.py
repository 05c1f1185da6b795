"""Every family trains in two processes, FSDP2 block by block and DDP, as it does in one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.backbones.tiny import TINY
from tests.backbones.two_shards import MODES

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes, started once for all families, report."""
    path = tmp_path_factory.mktemp("shards") / "found.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.backbones.two_shards", str(path)]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **shared, "PYTHONPATH": paths, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=900) for process in processes] == [0, 0]
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", list(TINY))
def test_two_processes_train_as_one(found: dict[str, Any], name: str) -> None:
    assert found[name]["moved"] > 1e-2
    assert {mode: found[name][mode] for mode in MODES} == pytest.approx(dict.fromkeys(MODES, 0.0), abs=5e-4)
