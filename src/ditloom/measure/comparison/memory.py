"""The most memory taken while something ran: of the process on a CPU, of the allocator on an accelerator."""

from __future__ import annotations

import re
from pathlib import Path

import torch

NOBODY_SAYS = "this system does not let a process reset its high-water mark"
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak(device: torch.device) -> bool:
    """Begin a new high-water mark; False where that is not possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak(device: torch.device) -> int | None:
    """Bytes at the high-water mark since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
