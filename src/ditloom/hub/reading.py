"""Files and folders of other code bases to tensors. Nothing in them is run."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.hub.format import Foreign

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
WEIGHTS = "diffusion_pytorch_model"
NESTED = ("ema", "model", "state_dict", "module")
WRAPPERS = ("module.", "_orig_mod.")
AVERAGES = ("ema_denoiser.",)


def read(path: Path) -> Foreign:
    """A safetensors or torch file, or a folder with config.json (or with transformer/config.json) and weights."""
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}")
    if path.is_dir():
        return _read_folder(path)
    held = _read_file(path)
    tensors, model = _state_dict(held, path)
    return Foreign(tensors, name=path.name, model=model or path.stem)


def _read_folder(path: Path) -> Foreign:
    folder = path / "transformer" if (path / "transformer" / "config.json").exists() else path
    settings = _json(folder / "config.json")
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        tensors.update(_state_dict(_read_file(file), file)[0])
    return Foreign(tensors, settings, path.name, str(settings.get("_class_name", "")))


def _weight_files(folder: Path) -> list[Path]:
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if index.exists():
        names = sorted(set(_json(index)["weight_map"].values()))
        absent = [name for name in names if not (folder / name).exists()]
        if absent:
            raise UserError(f"{folder} lacks {absent[0]}, one of {len(names)} files its index names")
        return [folder / name for name in names]
    for pattern in (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin", "*.safetensors", *(f"*{s}" for s in PICKLES)):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found
        if found:
            listed = ", ".join(file.name for file in found)
            raise UserError(f"{folder} holds several weight files ({listed}): give the path of one of them")
    raise UserError(f"{folder} holds no weights: no .safetensors, {', '.join(PICKLES)} file")


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path.parent} holds no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no table of settings")
    return value


def _read_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file: {_first_line(error)}") from error
    if path.suffix in PICKLES:
        return _read_pickle(path)
    raise UserError(f"{path} is neither a .safetensors nor a {', '.join(PICKLES)} file")


def _read_pickle(path: Path) -> Any:
    """torch.load that builds tensors and plain values only; train.py's argparse.Namespace is a plain value."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if "GLOBAL" in text or "global" in text or "Unsupported operand" in text:
            raise UserError(
                f"{path} holds Python code beside tensors and was not opened; ask its author for a .safetensors file"
            ) from error
        raise UserError(f"{path} is not a whole torch file: {_first_line(error)}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path} is not a whole torch file: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["it is empty"])[0]


def _state_dict(held: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors, EMA first, and the model's name if the file tells it."""
    if not isinstance(held, Mapping):
        raise UserError(f"{path} holds a {type(held).__name__} and no state dict")
    model = str(getattr(held.get("args"), "model", "") or "")
    for key in NESTED:
        inner = held.get(key)
        if isinstance(inner, Mapping) and inner:
            return _state_dict(inner, path)[0], model
    tensors = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors: its keys are {', '.join(map(str, list(held)[:5]))}")
    return unwrapped(tensors), model


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that DDP or torch.compile puts before every name; of a training module its average alone."""
    for prefix in AVERAGES:
        tensors = {name: value for name, value in tensors.items() if name.startswith(prefix)} or tensors
    for prefix in (*AVERAGES, *WRAPPERS):
        if all(name.startswith(prefix) for name in tensors):
            return unwrapped({name.removeprefix(prefix): value for name, value in tensors.items()})
    return dict(tensors)
