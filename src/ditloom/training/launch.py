"""One process by default, many under `torchrun`; and a polite answer to SIGTERM."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ditloom.contracts.errors import UserError

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


@dataclass(frozen=True)
class World:
    """This process among the others: its rank, how many there are, and its device."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    distributed: bool = False

    @property
    def leader(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any process says so; all must ask."""
        return bool(self.sum(torch.tensor(int(flag))).item())

    def share(self, value: Any) -> Any:
        """The leader's value, on every process; it must be plain data."""
        if not self.distributed:
            return value
        box = [value if self.leader else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextlib.contextmanager
def launched(device: str | None = None) -> Iterator[World]:
    """The world of this process: from the environment that `torchrun` sets, or alone.

    device: "cpu" or "cuda"; by default CUDA where there is one. Leaves the process group on the way out.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in BACKENDS:
        raise UserError(f"device {kind!r} cannot train: choose one of {', '.join(BACKENDS)}")
    if "RANK" not in os.environ:
        yield World(device=torch.device(kind))
        return
    rank, size, local_rank = (_environment(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    place = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group(BACKENDS[kind])
    try:
        yield World(rank, size, place, distributed=True)
    finally:
        dist.destroy_process_group()


def _environment(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise UserError(f"the launcher set RANK but {name} is {text!r}: start several processes with torchrun")
    return int(text)


class StopRequest:
    """Set by SIGTERM or Ctrl-C while it is entered: the loop sees it, saves and leaves.

    A second Ctrl-C interrupts at once. Outside the main thread no signal can be caught; call `set` there.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def set(self) -> None:
        """Ask the loop to stop after the current step."""
        self.requested = True

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
