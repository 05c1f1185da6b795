"""The published sizes of every family, by name."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ditloom.contracts.backbone import Backbone, BackboneConfig
from ditloom.contracts.errors import UnknownName
from ditloom.contracts.registries import BACKBONES


def backbone_config(values: Mapping[str, Any]) -> BackboneConfig:
    """A backbone configuration from plain values with a "family"."""
    return config_class(values["family"]).from_dict(values)


def config_class(family: str) -> type[BackboneConfig]:
    """The settings class of a family, by registry name."""
    return type(next(iter(family_presets(BACKBONES.get(family)).values())))


def family_presets(family: type[Backbone]) -> Mapping[str, BackboneConfig]:
    """The published sizes of a family: `PRESETS` of its file."""
    return sys.modules[family.__module__].PRESETS


def presets() -> dict[str, BackboneConfig]:
    """Every published preset by name."""
    found: dict[str, BackboneConfig] = {}
    for family in BACKBONES.names():
        found |= family_presets(BACKBONES.get(family))
    return found


def preset(name: str) -> BackboneConfig:
    """A published preset, its name in upper or lower case."""
    known = presets()
    found = {key.casefold(): config for key, config in known.items()}.get(name.casefold())
    if found is None:
        raise UnknownName("backbone", name, known)
    return found


def build(name: str, **changes: Any) -> Backbone:
    """A freshly initialised backbone by its published name, with settings changed: build("DiT-S/2", image_size=16)."""
    config = preset(name)
    return type(config).from_dict({**config.to_dict(), **changes}).build()
