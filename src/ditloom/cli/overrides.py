"""`--set part.key=value`: single settings of a YAML file changed on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import yaml

from ditloom.contracts.errors import UserError


def overridden(values: Any, changes: Iterable[str]) -> Any:
    """The values with each "a.b.c=value" put in; a value is read as YAML."""
    changed = deepcopy(values)
    for change in changes:
        path, equals, text = change.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"--set takes part.key=value, such as train.batch=64; got {change!r}")
        _put(changed, keys, _value(change, text))
    return changed


def _put(values: Any, keys: list[str], value: Any) -> None:
    place = values
    for depth, key in enumerate(keys):
        if not isinstance(place, dict):
            whole = ".".join(keys[:depth])
            raise UserError(f"--set {'.'.join(keys)}: {whole} is {place!r}, which has no parts; set {whole} as a whole")
        if depth < len(keys) - 1:
            place = place.setdefault(key, {})
    place[keys[-1]] = value


def _value(change: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {change}: {text!r} is not a YAML value") from error
