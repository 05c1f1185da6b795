"""Turn a foreign checkpoint or a training run into a model folder, or a model into a foreign format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from ditloom.cli.command import Answer, Command, OptionalText
from ditloom.cli.place import dtype_of
from ditloom.cli.show import count, shown_path
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.registry import register

if TYPE_CHECKING:
    from ditloom.contracts.backbone import Backbone, BackboneConfig
    from ditloom.model import Model


@register("convert")
@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Convert weights. The source is found out by itself: a model, a run folder with checkpoints, or a foreign file.

    A foreign checkpoint holds a network alone. What surrounds it in a model folder is the family's own process, pixels
    or latents as they come, and class labels; say otherwise with --process, --latents and --conditioner, for instance
    --latents diffusers-vae:source=stabilityai/sd-vae-ft-ema
    """

    source: Positional[Path]
    """a model, a run folder, a .safetensors or .pt file, or a diffusers folder"""
    target: Positional[Path]
    """the folder or file to write"""
    to_format: OptionalText = None
    """write a foreign format in place of a model folder"""
    from_format: OptionalText = None
    """the format of a foreign source; unless given, found by its tensors"""
    backbone: OptionalText = None
    """what weights do not tell, as NAME:KEY=VALUE with a published name or a family, such as dit:heads=6,depth=12"""
    process: OptionalText = None
    """the noise process of a foreign source"""
    latents: OptionalText = None
    """the latent space of a foreign source"""
    conditioner: OptionalText = None
    """the conditioner of a foreign source"""
    average: OptionalText = None
    """which moving average of a run; none for the weights as they are"""
    dtype: OptionalText = None
    """store as fp32, bf16 or fp16; unless given, as they come"""

    def run(self) -> Answer:
        from ditloom.hub.checkpoint import save_foreign

        dtype = None if self.dtype is None else dtype_of(self.dtype)
        self._check_format()
        model = self._model()
        if self.to_format is not None:
            model.backbone.to(dtype)
            written = save_foreign(model.backbone, self.to_format, self.target)
        else:
            written = model.save(self.target, dtype)
        numbers = sum(p.numel() for p in model.backbone.parameters())
        family = model.backbone.preset.family
        document = {"written": written, "family": family, "parameters": numbers, "format": self.to_format or "model"}
        return Answer(document, [f"{family} of {count(numbers)} parameters: {shown_path(written)}"])

    def _check_format(self) -> None:
        from ditloom.hub.formats import FORMATS

        for name in (self.to_format, self.from_format):
            if name is not None:
                FORMATS.get(name)

    def _model(self) -> Model:
        from ditloom.loading import load, names
        from ditloom.training.checkpoint import folders
        from ditloom.training.export import exported

        if str(self.source) in names() or _is_model(self.source):
            return load(self.source)
        if folders(self.source):
            return exported(self.source, self.average)
        return self._foreign()

    def _foreign(self) -> Model:
        from ditloom.hub.checkpoint import load_foreign

        config = None if self.backbone is None else config_of(self.backbone)
        backbone = load_foreign(self.source, config, self.from_format)
        return surrounded(backbone, self.process, self.latents, self.conditioner, self.source.stem)


def surrounded(
    backbone: Backbone, process: str | None, latents: str | None, conditioner: str | None, name: str
) -> Model:
    """A model around a network: what is not given follows from the family."""
    from ditloom.contracts.registries import CONDITIONERS, LATENTS, PROCESSES
    from ditloom.contracts.settings import registered
    from ditloom.model import Model
    from ditloom.training.resolve import instance, spelled

    preset: Any = backbone.preset
    classes, text = getattr(preset, "classes", 0), getattr(preset, "text_width", 0)
    if conditioner is None and text:
        raise UserError("this network hears text: name its encoder, such as --conditioner hub-text:source=...")
    hears = {"name": "labels", "num_classes": classes} if classes else {"name": "none"}
    noised = getattr(type(preset), "process", {"name": "linear"})
    return Model(
        backbone,
        registered(PROCESSES, process or dict(noised)),
        instance(LATENTS, spelled(latents or {"name": "pixels", "channels": preset.channels})),
        instance(CONDITIONERS, spelled(conditioner or hears)),
        info={"name": name},
    )


def config_of(spec: str) -> BackboneConfig:
    """ "DiT-S/2:image_size=16" or "dit:depth=12,heads=6" to a configuration."""
    from ditloom.contracts.registries import BACKBONES
    from ditloom.contracts.settings import parse
    from ditloom.presets import backbone_config, presets

    name, changes = parse(spec)
    if name in BACKBONES.names():
        return backbone_config({"family": name, **changes})
    known = {key.casefold(): value for key, value in presets().items()}
    if name.casefold() not in known:
        raise UnknownName("backbone", name, [*BACKBONES.names(), *presets()])
    base = known[name.casefold()]
    return type(base).from_dict({**base.to_dict(), **changes})


def _is_model(folder: Path) -> bool:
    """Whether a folder's config.json is one of ours and not of another library."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, Mapping) and "backbone" in config
