"""Names to implementations: a name is a file name, and the file is imported when the name is first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ditloom.contracts.errors import UnknownName


@dataclass(frozen=True)
class Registration:
    """What `@register` noted about one implementation."""

    name: str
    target: Any
    paper: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def register(name: str, *, paper: str = "", **facts: Any) -> Callable[[Any], Any]:
    """Mark the one public implementation of a file: its registry name, its paper, and facts for listings."""

    def note(target: Any) -> Any:
        target.__registration__ = Registration(name, target, paper, facts)
        return target

    return note


class Registry:
    """All implementations of one kind: the files of `packages`, plus the entry points of `group`."""

    def __init__(self, kind: str, *packages: str, group: str | None = None):
        self.kind, self.packages, self.group = kind, packages, group
        self._local: dict[str, Registration] = {}

    def names(self) -> list[str]:
        """Every known name, sorted; reads directory listings only and imports nothing."""
        return sorted({*self._modules(), *self._entry_points(), *self._local})

    def get(self, name: str) -> Any:
        """The class or function registered as `name`; `UnknownName` if there is none."""
        return self.info(name).target

    def info(self, name: str) -> Registration:
        """The registration of `name`: target, paper, facts."""
        if name in self._local:
            return self._local[name]
        modules = self._modules()
        if name in modules:
            return _registration_in(import_module(modules[name]), name)
        points = self._entry_points()
        if name in points:
            return _as_registration(points[name].load(), name)
        raise UnknownName(self.kind, name, self.names())

    def add(self, target: Any) -> Any:
        """Register an implementation of the running program (a notebook, a test); returns it."""
        registration = target.__registration__
        self._local[registration.name] = registration
        return target

    def _modules(self) -> dict[str, str]:
        found = {}
        for package in self.packages:
            for folder in _folders(package):
                for path in sorted(folder.glob("[!_]*.py")):
                    if _declares_registration(path):
                        found[path.stem.replace("_", "-")] = f"{package}.{path.stem}"
        return found

    def _entry_points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)} if self.group else {}


def _folders(package: str) -> list[Path]:
    spec = find_spec(package)
    return [Path(p) for p in spec.submodule_search_locations or ()] if spec else []


def _declares_registration(path: Path) -> bool:
    """A file without `@register` is a helper of its folder, not an entry."""
    return "@register(" in path.read_text(encoding="utf-8")


def _registration_in(module: Any, name: str) -> Registration:
    for value in vars(module).values():
        registration = getattr(value, "__registration__", None)
        if registration is not None and registration.name == name and registration.target is value:
            return registration
    raise ImportError(f"{module.__name__} holds no @register({name!r})")


def _as_registration(target: Any, name: str) -> Registration:
    return getattr(target, "__registration__", None) or Registration(name, target)
