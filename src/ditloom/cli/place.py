"""Where a command runs: this process among its siblings, the device and the number format."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditloom.contracts.errors import UnknownName, UserError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Share:
    """One of `size` processes that share work by index and never speak to each other."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0


def share() -> Share:
    """This process as `torchrun` numbered it, or alone."""
    if "RANK" not in os.environ:
        return Share()
    values = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    values["LOCAL_RANK"] = values["LOCAL_RANK"] or values["RANK"]
    for name, text in values.items():
        if not text.isdecimal():
            raise UserError(f"RANK is set and {name} is {text!r}: start several processes with torchrun")
    found = Share(*(int(text) for text in values.values()))
    if found.rank >= found.size:
        raise UserError(f"RANK is {found.rank} and WORLD_SIZE {found.size}: start several processes with torchrun")
    return found


def device_of(name: str, local_rank: int = 0) -> str:
    """A device that is there; "auto" takes the fastest kind."""
    import torch

    kind = name.partition(":")[0]
    if kind not in DEVICES:
        raise UnknownName("device", name, DEVICES)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k, present in there.items() if present) if kind == "auto" else kind
    if not there[kind]:
        raise UserError(f"this machine has no {kind} device: choose {' or '.join(k for k in there if there[k])}")
    if kind != "cuda":
        return kind
    number = name.partition(":")[2] or str(local_rank % torch.cuda.device_count())
    if not number.isdecimal() or int(number) >= torch.cuda.device_count():
        raise UserError(f"this machine has the devices cuda:0 to cuda:{torch.cuda.device_count() - 1}, not {name}")
    return f"cuda:{number}"


def dtype_of(name: str) -> torch.dtype:
    """fp32, bf16 or fp16."""
    import torch

    if name not in DTYPES:
        raise UnknownName("dtype", name, DTYPES)
    return getattr(torch, DTYPES[name])
