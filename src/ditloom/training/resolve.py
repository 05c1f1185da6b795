"""What a recipe says of its model, made a full config.json: names spelled out, sizes taken from data and latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ditloom.contracts.data import DataSource
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.registries import CONDITIONERS, LATENTS
from ditloom.contracts.settings import parse
from ditloom.presets import config_class, preset
from ditloom.training.config import Spec

PARTS = ("backbone", "process", "latents", "conditioner", "sampling", "info")


def resolved(values: Mapping[str, Any], source: DataSource, size: int | None) -> dict[str, Any]:
    """The config.json of a recipe's model for a data source whose pictures are taken at `size` (None: its own)."""
    for key in values:
        if key not in PARTS:
            raise UnknownName("setting in model", key, PARTS)
    if "backbone" not in values:
        raise UserError("the recipe's model has no 'backbone': give a published name or its settings")
    config_class, base = family_of(values["backbone"])
    config = {key: dict(values[key]) for key in ("sampling", "info") if key in values}
    config["process"] = spelled(values.get("process", getattr(config_class, "process", "linear")))
    config["latents"] = spelled(values.get("latents", "pixels"))
    config["conditioner"] = spelled(values.get("conditioner", "labels" if source.info.classes else "none"))
    if config["conditioner"] == {"name": "labels"}:
        config["conditioner"]["names"] = list(source.info.classes or ())
    known = {field.name for field in fields(config_class)}
    fits = {key: value for key, value in fitted(config, source, size).items() if key in known}
    given = {} if isinstance(values["backbone"], str) else dict(values["backbone"])
    given = {key: value for key, value in given.items() if key not in ("preset", "family")}
    config["backbone"] = config_class.from_dict({**base, **fits, **given}).to_dict()
    return config


def family_of(spec: Spec) -> tuple[Any, dict[str, Any]]:
    """The configuration class of a backbone given by published name or family, and the values it starts from."""
    name = spec if isinstance(spec, str) else spec.get("preset")
    if name is not None:
        found = preset(str(name))
        return type(found), found.to_dict()
    if isinstance(spec, str) or "family" not in spec:
        raise UserError("a backbone needs a 'family' or a 'preset'")
    return config_class(spec["family"]), {}


def fitted(config: Mapping[str, Any], source: DataSource, size: int | None) -> dict[str, Any]:
    """What latent space, conditioner, process and data decide about a backbone."""
    latents, conditioner = instance(LATENTS, config["latents"]), instance(CONDITIONERS, config["conditioner"])
    fits: dict[str, Any] = {"channels": latents.channels, "classes": getattr(conditioner, "num_classes", 0)}
    side = size or (max(source.info.size) if source.info.size else None)
    if side is not None:
        fits["image_size"] = side // latents.factor
    fits["learn_sigma"] = str(config["process"].get("predicts", "")).endswith("+var")
    if hasattr(conditioner, "width"):
        width = conditioner.width
        fits |= {"text_width": width, "pooled_width": width, "text_tokens": conditioner.max_tokens}
    return fits


def instance(registry: Any, settings: Mapping[str, Any]) -> Any:
    """One component from its settings."""
    return registry.get(settings["name"])(**{key: value for key, value in settings.items() if key != "name"})


def spelled(spec: Spec) -> dict[str, Any]:
    """A spec as a mapping with a name."""
    if isinstance(spec, str):
        name, settings = parse(spec)
        return {"name": name, **settings}
    return dict(spec)
