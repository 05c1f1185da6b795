"""Runs a module twice, as the two gloo ranks of one world."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_as_two(module: str, argument: Path, timeout: int) -> None:
    """`python -m module argument` as ranks 0 and 1; both must succeed within so many seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, str(argument)]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **shared, "PYTHONPATH": paths, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=timeout) for process in processes] == [0, 0]
