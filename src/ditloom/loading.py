"""Finding a model: bundled, in a folder or on the hub; and filling it with its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.registries import CONDITIONERS, LATENTS, PROCESSES
from ditloom.contracts.settings import registered
from ditloom.model import Model
from ditloom.presets import backbone_config

BUNDLED = files("ditloom") / "assets" / "models"


def names() -> list[str]:
    """The bundled models."""
    return sorted(p.name for p in BUNDLED.iterdir() if (p / "config.json").is_file()) if BUNDLED.is_dir() else []


def load(name: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Model:
    """A model by bundled name, folder, or hub id (``owner/name``)."""
    folder = _locate(str(name))
    config = _read_config(folder)
    with torch.random.fork_rng(devices=[]):
        model = assemble(config)
    _load_weights(model, folder)
    model.folder = folder
    model.backbone.eval().requires_grad_(False)
    return model.to(device, dtype)


def assemble(config: Mapping[str, Any]) -> Model:
    """The model that a config.json describes, with fresh weights."""
    backbone = backbone_config(config["backbone"]).build()
    latents = _build(LATENTS, config["latents"])
    conditioner = _build(CONDITIONERS, config["conditioner"])
    process = registered(PROCESSES, config["process"])
    sampling, info = dict(config.get("sampling", {})), dict(config.get("info", {}))
    return Model(backbone, process, latents, conditioner, sampling, info)


def _build(registry: Any, config: Mapping[str, Any]) -> Any:
    settings = {k: v for k, v in config.items() if k != "name"}
    return registry.get(config["name"])(**settings)


def _locate(name: str) -> Path:
    bundled = BUNDLED / name
    if "/" not in name and (bundled / "config.json").is_file():
        return Path(str(bundled))
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise UserError(f"{name} is not a model folder: it holds no config.json")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name)
    raise UnknownName("model", name, names())


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["config.json", "model.safetensors", "recipe.json"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise UserError(f"cannot get the model {name!r} from the hub: {type(error).__name__}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/config.json cannot be read: {error}") from error
    missing = {"backbone", "process", "latents", "conditioner"} - config.keys()
    if missing:
        raise UserError(f"{folder}/config.json lacks {', '.join(sorted(missing))}")
    return config


def _load_weights(model: Model, folder: Path) -> None:
    try:
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}/model.safetensors cannot be read: {error}") from error
    for name, part in model.parts().items():
        own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        check_state(part.state_dict(), own, f"{folder.name}: {name}")
        part.load_state_dict({k: v.to(part.state_dict()[k].dtype) for k, v in own.items()}, strict=True)


def check_state(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """One sentence naming missing, unknown and mis-shaped tensors, if there are any."""
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    shapes = [k for k in expected.keys() & given.keys() if expected[k].shape != given[k].shape]
    wrong = [f"{k} is {list(given[k].shape)}, expected {list(expected[k].shape)}" for k in sorted(shapes)]
    labelled = (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
    parts = [f"{label}: {', '.join(items[:4])}{' ...' if len(items) > 4 else ''}" for label, items in labelled if items]
    if parts:
        raise UserError(f"{what} does not fit its configuration ({'; '.join(parts)})")
