"""What this machine is and how fast: processor, memory, accelerators, matrix products, attention, a model."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

BACKENDS = {0: "math", 1: "flash", 2: "memory-efficient", 3: "cudnn", 4: "overrideable"}
NUMBER_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
SIDES = {"cpu": 1024}
LARGE_SIDE = 8192


def versions() -> dict[str, str]:
    """Python, the platform, and what the core needs."""
    needed = ("torch", "numpy", "safetensors", "huggingface-hub", "tyro", "PyYAML", "rich", "pillow")
    found = {name: installed(name) or "missing" for name in needed}
    return {"python": platform.python_version(), "platform": platform.platform(), **found}


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def extras() -> dict[str, dict[str, str | None]]:
    """Each extra of this package with its packages and their installed versions."""
    try:
        wanted = metadata.requires("ditloom") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, dict[str, str | None]] = {}
    for requirement in wanted:
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", requirement)
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if extra and name:
            found.setdefault(extra[1], {})[name[0]] = installed(name[0])
    return found


def processor() -> dict[str, Any]:
    """Name, usable cores, memory in bytes, and the vector units that matter here."""
    text = _read("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", text)
    flags = set((re.search(r"(?:flags|Features)\s*:\s*(.+)", text) or [""])[0].split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": name[1].strip() if name else platform.processor() or platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory": _memory("MemTotal"),
        "memory_free": _memory("MemAvailable"),
        "units": {unit: unit in flags for unit in UNITS},
    }


def memory_free(device: str) -> int | None:
    """Bytes that are free on a device, or None where nobody says."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return _memory("MemAvailable")


def accelerators() -> list[dict[str, Any]]:
    """CUDA and Apple devices."""
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": about.name,
                "memory": about.total_memory,
                "bf16": torch.cuda.is_bf16_supported(),
                "capability": f"{about.major}.{about.minor}",
            }
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU"})
    return found


def matmul_speed(device: str, dtype: torch.dtype, seconds: float) -> float:
    """Floating-point operations a second of a square matrix product."""
    side = SIDES.get(device.partition(":")[0], LARGE_SIDE)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / timed(lambda: a @ b, device, seconds)


def model_speed(
    device: str, dtype: torch.dtype, seconds: float, name: str = "DiT-S/2", batch: int = 4
) -> dict[str, Any]:
    """Images a second of a forward of a published backbone, and the operations a second that takes."""
    from ditloom.presets import build

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build(name).to(device=device, dtype=dtype).eval()
    x, t, condition = backbone.example(batch, device)
    x, condition = x.to(dtype), condition.to(device, dtype)
    with torch.no_grad():
        streams, _ = backbone.embed(x, backbone.preset.time.native(t), backbone.prepare(condition))
        taken = timed(lambda: backbone(x, t, condition), device, seconds)
    flops = 2 * backbone.macs(streams.layout) * batch / taken
    return {"model": name, "batch": batch, "images_per_second": batch / taken, "flops": flops}


def attention_backend(device: str, dtype: torch.dtype, tokens: int = 256) -> str:
    """Which kernel attention runs on: seen by calling it, not by asking what should be."""
    from ditloom.parts.attention import kernel

    q, k, v = (torch.randn(1, tokens, 6, 64, device=device).to(dtype) for _ in range(3))
    with _Seen() as seen:
        kernel(q, k, v)
    if torch.nn.functional.scaled_dot_product_attention not in seen.called:
        return "explicit products"
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return f"fused ({BACKENDS.get(torch._fused_sdp_choice(q, k, v), 'unknown')})"


class _Seen(TorchFunctionMode):
    """Remembers which torch functions were called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        self.called.append(func)
        return func(*args, **(kwargs or {}))


def timed(work: Callable[[], Any], device: str, seconds: float) -> float:
    """The shortest of the runs that fit into `seconds`, at least two, after one to warm up."""
    taken: list[float] = []
    for _ in range(10_000):
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
        if len(taken) >= 3 and sum(taken[1:]) > seconds:
            break
    return min(taken[1:])


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _memory(name: str) -> int | None:
    found = re.search(rf"{name}:\s*(\d+) kB", _read("/proc/meminfo"))
    if found:
        return int(found[1]) * 1024
    known = name == "MemTotal" and "SC_PHYS_PAGES" in os.sysconf_names
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None
