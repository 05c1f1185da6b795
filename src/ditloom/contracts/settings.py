"""Settings written by people: "min-snr:gamma=5", a mapping with a "name", or an object that is ready."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.registry import Registry

_PIECES = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|.""", re.DOTALL)
"""A quoted text as a whole, or one letter."""


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """ "name:key=value,key=(1,2)" to the name and its settings; values are Python literals, else text."""
    name, _, listed = spec.partition(":")
    return name.strip(), dict(_setting(spec, item) for item in _items(listed) if item.strip())


def _items(listed: str) -> list[str]:
    """What commas part, those inside brackets and quotes aside."""
    items, depth = [""], 0
    for piece in _PIECES.findall(listed):
        depth += (piece in "([{") - (piece in ")]}")
        if piece == "," and not depth:
            items.append("")
        else:
            items[-1] += piece
    return items


def _setting(spec: str, item: str) -> tuple[str, Any]:
    key, equals, value = item.partition("=")
    if not equals:
        raise UserError(f"{spec!r}: expected name:key=value,key=value, got {item.strip()!r} without a value")
    try:
        return key.strip().replace("-", "_"), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        return key.strip().replace("-", "_"), value.strip()


def construct(kind: str, cls: Any, settings: Mapping[str, Any]) -> Any:
    """An instance of a settings dataclass; an unknown key names the nearest one."""
    known = {f.name for f in fields(cls)}
    for key in settings.keys() - known:
        raise UnknownName(f"{kind} setting", key, known)
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})


def named(kind: str, table: Mapping[str, Any], spec: Any) -> Any:
    """An entry of a small table, built from a spec; an object that is no text and no mapping is returned as it is."""
    if not isinstance(spec, str | Mapping):
        return spec
    name, settings = _name_and_settings(spec)
    if name not in table:
        raise UnknownName(kind, name, table)
    return construct(f"{kind} {name}", table[name], settings)


def registered(registry: Registry, spec: Any) -> Any:
    """An entry of a registry, built from a spec; an object that is no text and no mapping is returned as it is."""
    if not isinstance(spec, str | Mapping):
        return spec
    name, settings = _name_and_settings(spec)
    return construct(f"{registry.kind} {name}", registry.get(name), settings)


def _name_and_settings(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return parse(spec)
    if "name" not in spec:
        raise UserError(f"expected a mapping with a 'name', got the keys {sorted(spec)}")
    return spec["name"], {k: v for k, v in spec.items() if k != "name"}


def positive(**values: float) -> None:
    """Refuse settings that are not above zero."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name} must be above 0, got {value}")
