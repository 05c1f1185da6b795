"""Assets on disk: a small safetensors file whose metadata says what they were made for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets

MADE_FOR = "made_for"


def read(path: str | Path) -> Assets:
    """The assets of a file; one sentence when it cannot be read or is something else."""
    path = Path(path).expanduser()
    try:
        with safe_open(path, framework="pt") as file:
            made_for = _made_for(file.metadata(), path)
            return Assets({name: file.get_tensor(name) for name in file.keys()}, made_for)  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"the calibration {path} cannot be read: {error}") from error


def packed(assets: Assets) -> bytes:
    """The bytes of the file of some assets."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in assets.tensors.items()}
    return save(tensors, {MADE_FOR: json.dumps(dict(assets.made_for), sort_keys=True)})


def write(path: str | Path, assets: Assets) -> Path:
    """Write the file of some assets; a method reads it with its setting `calibration`."""
    path = Path(path).expanduser()
    try:
        path.write_bytes(packed(assets))
    except OSError as error:
        raise UserError(f"the calibration cannot be written to {path}: {error.strerror or error}") from error
    return path


def _made_for(metadata: Mapping[str, str] | None, path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((metadata or {})[MADE_FOR]))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a calibration: it does not say what it was made for") from error
