"""Foreign checkpoints in and out: found by their keys, checked key by key and shape by shape, bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.backbone import Backbone, BackboneConfig
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.hub.format import Foreign, Format, check
from ditloom.hub.formats import FORMATS
from ditloom.hub.keymap import Tensors
from ditloom.hub.reading import PICKLES, WEIGHTS, read, unwrapped
from ditloom.training.durable import explained, replace_file, sync_folder, tensor_chunks, write_file


def load_foreign(
    source: str | Path | Mapping[str, Tensor], config: BackboneConfig | None = None, format: str | None = None
) -> Backbone:
    """The network of a foreign checkpoint, in the checkpoint's dtype.

    source: a .safetensors, .pt, .pth, .bin or .ckpt file, a diffusers folder, or a state dict. config: for sizes that
    weights do not tell (the number of heads of an unpublished size). format: a name of `FORMATS`; else it is found by
    the keys. DiT and SiT share theirs: then the file's own name for the model decides ("SiT-XL-2-256.pt").
    """
    given = _foreign(source)
    chosen = _named(format) if format else _recognised(given, config)
    if config is not None and config.family != chosen.family:
        raise UserError(f"{given.name} is a {chosen.family!r} checkpoint; the configuration is for {config.family!r}")
    config = config or chosen.config(given)
    given = replace(given, tensors={k: v for k, v in given.tensors.items() if k not in chosen.unused})
    with torch.device("meta"):
        backbone = config.build()
    like = backbone.state_dict()
    check(given, chosen.keymap.out(like, config))
    ours = chosen.keymap.back(given.tensors, like, config)
    backbone.load_state_dict(ours, strict=True, assign=True)
    return backbone


def save_foreign(backbone: Backbone, format: str, path: str | Path) -> Path:
    """Write the weights in a foreign format: for diffusers a new folder, else one file, of the kind its suffix says."""
    chosen, path = _named(format), Path(path)
    config = backbone.preset
    if config.family != chosen.family:
        raise UserError(f"the format {format!r} is for the family {chosen.family!r}; this model is {config.family!r}")
    settings = chosen.settings(config)
    tensors = chosen.keymap.out({k: v.detach().cpu() for k, v in backbone.state_dict().items()}, config)
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_folder(path, tensors, settings) if chosen.folder else _write_file(path, tensors)
    return path


def foreign_state_dict(backbone: Backbone, format: str) -> Tensors:
    """The tensors that `save_foreign` would write."""
    return _named(format).keymap.out(backbone.state_dict(), backbone.preset)


def _foreign(source: str | Path | Mapping[str, Tensor]) -> Foreign:
    if isinstance(source, str | Path):
        return read(Path(source))
    return Foreign({name: value.detach().clone() for name, value in unwrapped(source).items()}, name="the state dict")


def _named(name: str) -> Format:
    return FORMATS.get(name)()


def _recognised(given: Foreign, config: BackboneConfig | None) -> Format:
    """The one format with these keys; among several, that of the given configuration, or of the file's own name."""
    every = [(name, _named(name)) for name in FORMATS.names()]
    found = [(name, f) for name, f in every if f.recognises(given)]
    if config is not None:
        found = [(name, f) for name, f in found if f.family == config.family] or [
            (name, f) for name, f in every if f.family == config.family
        ][:1]
    if not found:
        some = ", ".join(list(given.tensors)[:3])
        written = f" (written by {given.model})" if given.model else ""
        raise UserError(
            f"{given.name}{written} is in none of the known formats {', '.join(FORMATS.names())}: its keys begin {some}"
        )
    if len(found) > 1:
        found = [(n, f) for n, f in found if _says(given.model, f.family)] or found
    if len(found) > 1:
        names = " or ".join(repr(name) for name, _ in found)
        raise UserError(f"the keys of {given.name} fit several formats: say which one with format={names}")
    return found[0][1]


def _says(model: str, family: str) -> bool:
    return re.search(rf"(?<![a-z]){family}(?![a-z])", model.lower()) is not None


def _write_file(path: Path, tensors: Tensors) -> None:
    if path.suffix == ".safetensors":
        replace_file(path, tensor_chunks(tensors, {"format": "pt"}))
        return
    if path.suffix not in PICKLES:
        raise UnknownName("suffix", path.suffix, (".safetensors", *PICKLES))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            torch.save({name: value.clone() for name, value in tensors.items()}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def _write_folder(path: Path, tensors: Tensors, settings: Mapping[str, Any]) -> None:
    if path.exists():
        raise UserError(f"{path} exists already: give the name of a new folder")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.mkdir()
        write_file(beside / f"{WEIGHTS}.safetensors", tensor_chunks(tensors, {"format": "pt"}))
        write_file(beside / "config.json", [json.dumps(dict(settings), indent=2).encode()])
        sync_folder(beside)
        os.rename(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    sync_folder(path.parent)
