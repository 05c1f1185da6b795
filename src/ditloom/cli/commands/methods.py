"""List the methods that can be attached with --using, plug-ins among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from fnmatch import fnmatch
from typing import Any

from tyro.conf import Positional

from ditloom.cli.command import Answer, Command, OptionalText
from ditloom.cli.show import table
from ditloom.contracts.errors import UnknownName
from ditloom.contracts.registries import METHODS
from ditloom.contracts.registry import register


@register("methods")
@dataclass(frozen=True, kw_only=True)
class Methods(Command):
    """List the methods: what each acts on, its paper, its settings with their defaults."""

    name: Positional[OptionalText] = None
    """a name or a pattern such as "*cache*"; unless given, all"""

    def run(self) -> Answer:
        found = [described(name) for name in chosen(self.name, METHODS.names(), "method")]
        columns = ("method", "family", "touches", "status", "settings", "paper")
        rows = [(m["key"], m["family"], ", ".join(m["touches"]), m["status"], _settings(m), m["paper"]) for m in found]
        return Answer(found, [table(columns, rows) if rows else "no method is installed"])


def chosen(pattern: str | None, names: Sequence[str], kind: str) -> list[str]:
    """The names that match; one that matches none is answered by its nearest."""
    found = [name for name in names if pattern is None or fnmatch(name.casefold(), pattern.casefold())]
    if pattern is not None and not found:
        raise UnknownName(kind, pattern, names)
    return found


def described(name: str) -> dict[str, Any]:
    """One method; a plug-in that cannot be imported says so in its status and spoils nothing else."""
    try:
        noted = METHODS.info(name)
        target = noted.target
        touches = [str(touch) for touch in target.touches()]
        parameters = {f.name: _default(f) for f in fields(target)} if is_dataclass(target) else {}
    except Exception as error:
        broken = f"cannot be loaded: {type(error).__name__}: {error}"
        return {"key": name, "family": "", "paper": "", "touches": [], "status": broken, "parameters": {}}
    return {
        "key": name,
        "family": noted.facts.get("family") or target.__module__.split(".")[-2:][0],
        "paper": noted.paper,
        "touches": touches,
        "status": noted.facts.get("status", "ready"),
        "parameters": parameters,
        "about": (target.__doc__ or "").strip().partition("\n")[0],
    }


def _default(setting: Field[Any]) -> Any:
    if setting.default is not MISSING:
        return setting.default
    return setting.default_factory() if setting.default_factory is not MISSING else "(must be given)"


def _settings(method: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in method["parameters"].items())
