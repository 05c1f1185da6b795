"""Which adapter a module has, and what tells the guidance of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from ditloom.adapters.contract import Adapter
from ditloom.adapters.guidance import Told
from ditloom.contracts.errors import UserError
from ditloom.contracts.registries import ADAPTERS


def adapter_of(module: nn.Module) -> Adapter:
    """The adapter of a module's class; a sentence where there is none, or its library is of another version."""
    name, library = type(module).__name__, type(module).__module__.partition(".")[0]
    known: list[str] = []
    for entry in ADAPTERS.names():
        adapter = ADAPTERS.get(entry)()
        known += adapter.classes
        if name in adapter.classes and adapter.library in ("", library):
            check_version(adapter, name)
            return adapter
    raise UserError(
        f"no adapter knows the class {name} of {library}: give your own with adapter=... "
        f"(known are {', '.join(sorted(known))})"
    )


def check_version(adapter: Adapter, name: str) -> None:
    """Refuse a library of a version that the adapter was not checked with."""
    first, last = adapter.versions
    if not adapter.library or not first:
        return
    try:
        installed = version(adapter.library)
    except PackageNotFoundError:
        return
    if not _numbers(first) <= _numbers(installed) < _numbers(last):
        raise UserError(
            f"the adapter of {name} was checked with {adapter.library} from {first} to below {last}, and {installed} "
            "is installed"
        )


def told_by(pipe: Any, adapter: Adapter, branches: Sequence[str] | None) -> Told:
    """What tells the guidance of a pipeline; `branches` by the user go before what is known of its class."""
    if branches is not None:
        return Told(lambda pipe, values, heard: True, tuple(branches))
    name = type(pipe).__name__
    if name not in adapter.pipelines:
        raise UserError(
            f"nothing is known of the guidance of {name}: say the branches of its rows with branches=... "
            f"(known are {', '.join(adapter.pipelines) or 'none'})"
        )
    return adapter.pipelines[name]


def register_adapter(adapter: type[Adapter]) -> type[Adapter]:
    """Make an adapter of the running program known, so that `using` finds it by its class names."""
    return ADAPTERS.add(adapter)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in text.split(".")[:3])
