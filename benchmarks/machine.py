"""This machine in words, the clock to use on it, and the bare matrix products that other work is measured against."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROWS, INNER, OUTER = 1024, 384, 1536
PRODUCT_MACS = 2 * ROWS * INNER * OUTER


def in_words() -> str:
    """Such as "AMD EPYC, 2 cores, AVX512-bf16, no AMX"."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    bf16 = torch.cpu._is_avx512_bf16_supported()
    amx = torch.cpu._is_amx_tile_supported()
    cores = f"{os.cpu_count()} cores"
    return ", ".join([*named[:1], cores, "AVX512-bf16" if bf16 else "no AVX512-bf16", "AMX" if amx else "no AMX"])


def clock() -> Callable[[], float]:
    """On one thread that thread's own time, which leaves out what a busy machine does meanwhile; else the wall's."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def products() -> Tensor:
    """The two products in bf16 of a feed-forward network: PRODUCT_MACS multiply-accumulates."""
    x, up, down = _factors()
    return (x @ up) @ down


@cache
def _factors() -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((ROWS, INNER), (INNER, OUTER), (OUTER, INNER))
    x, up, down = (torch.randn(shape).bfloat16() / shape[0] ** 0.5 for shape in shapes)
    return x, up, down
