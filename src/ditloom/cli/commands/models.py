"""List the bundled models and every published backbone, with sizes and costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from ditloom.cli.command import Answer, Command, OptionalText
from ditloom.cli.commands.methods import chosen
from ditloom.cli.show import count, table
from ditloom.contracts.registry import register

if TYPE_CHECKING:
    from ditloom.contracts.backbone import BackboneConfig

NUMBERS = ("parameters", "MACs", "tokens")


@register("models")
@dataclass(frozen=True, kw_only=True)
class Models(Command):
    """List what `generate --model` and `ditloom.build` know by name.

    Parameters and multiply-accumulates (of one forward of one image at the native size) are counted from the modules.
    """

    name: Positional[OptionalText] = None
    """a name, a pattern such as "DiT-*", or a model folder; unless given, all"""

    def run(self) -> Answer:
        folder = Path(self.name or "")
        found = [folder_row(folder)] if self.name and (folder / "config.json").is_file() else self._rows()
        columns = ("model", "family", *NUMBERS, "weights", "paper")
        rows = [
            (m["name"], m["family"], count(m["parameters"]), count(m["macs"]), m["tokens"], m["weights"], m["paper"])
            for m in found
        ]
        return Answer(found, [table(columns, rows, right=NUMBERS)])

    def _rows(self) -> list[dict[str, Any]]:
        from ditloom.loading import BUNDLED, names
        from ditloom.presets import presets

        bundled, published = names(), presets()
        wanted = chosen(self.name, [*bundled, *published], "model")
        return [
            folder_row(Path(str(BUNDLED / name)), name) if name in bundled else preset_row(name, published[name])
            for name in wanted
        ]


def preset_row(name: str, config: BackboneConfig) -> dict[str, Any]:
    """A published backbone; its weights come from a checkpoint of one of `formats`."""
    return {"name": name, **counted(config), "weights": None, "formats": formats_of(config.family)}


def folder_row(folder: Path, name: str | None = None) -> dict[str, Any]:
    """A model folder, from its config.json alone."""
    from ditloom.presets import backbone_config

    values: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    info = values.get("info", {})
    shown = name or info.get("name") or folder.resolve().name
    row = {"name": shown, **counted(backbone_config(values["backbone"]))}
    parts = {part: values[part]["name"] for part in ("process", "latents", "conditioner")}
    return {**row, "weights": "bundled" if name else str(folder), **parts, "sampling": values["sampling"], "info": info}


def counted(config: BackboneConfig) -> dict[str, Any]:
    """Family, paper and counts of a backbone, from its modules without their weights."""
    from ditloom.contracts.backbone import on_paper
    from ditloom.contracts.registries import BACKBONES

    backbone, layout = on_paper(config)
    return {
        "family": config.family,
        "parameters": backbone.learned_parameters(),
        "macs": backbone.macs(layout),
        "tokens": layout.length(),
        "paper": BACKBONES.info(config.family).paper,
    }


def formats_of(family: str) -> list[str]:
    """The foreign checkpoint formats that hold this family."""
    from ditloom.hub.formats import FORMATS

    return [name for name in FORMATS.names() if FORMATS.get(name).family == family]
