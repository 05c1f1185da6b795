"""Latents of a whole source, encoded once: one safetensors file and its manifest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file beside, sync it, rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    save_file(dict(tensors), beside, dict(metadata))
    with open(beside, "rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)
