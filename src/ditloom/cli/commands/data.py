"""List the data sources, or fetch and look at one."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

from tyro.conf import Positional

from ditloom.cli.command import Answer, Command, OptionalText
from ditloom.cli.show import table
from ditloom.contracts.data import DataSource
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.registries import DATA
from ditloom.contracts.registry import register
from ditloom.contracts.settings import parse, registered

ACTIONS = ("list", "fetch")
REQUIRED = "(must be given)"


@register("data")
@dataclass(frozen=True, kw_only=True)
class Data(Command):
    """`data list` names the sources and their settings; `data fetch SOURCE` gets one ready and says what it holds.

    A source is written as NAME:KEY=VALUE,..., such as emoji:split=held-out or folder:path=pictures.zip
    """

    action: Positional[str] = "list"
    """list or fetch"""
    source: Positional[OptionalText] = None
    """what to fetch"""

    def run(self) -> Answer:
        if self.action not in ACTIONS:
            raise UnknownName("action of data", self.action, ACTIONS)
        return self._fetched() if self.action == "fetch" else self._listed()

    def _listed(self) -> Answer:
        found = [listed(name) for name in DATA.names()]
        rows = [(source["name"], source["about"], _settings(source["settings"])) for source in found]
        return Answer(found, [table(("source", "what it is", "settings"), rows)])

    def _fetched(self) -> Answer:
        if self.source is None:
            raise UserError(f"data fetch needs a source: one of {', '.join(DATA.names())}")
        source = source_of(self.source)
        info = source.info
        document = {
            "name": info.name,
            "examples": len(source),
            "channels": info.channels,
            "size": info.size,
            "classes": info.classes,
            "captioned": info.captioned,
            "licence": info.licence,
            "fingerprint": source.fingerprint(),
        }
        return Answer(document, [table(("", ""), [(key, _short(value)) for key, value in document.items()])])


def source_of(spec: Any) -> DataSource:
    """A data source from "NAME:KEY=VALUE,..." or a mapping with a name; a setting it cannot do without is named."""
    name, given = parse(spec) if isinstance(spec, str) else (spec.get("name", ""), spec)
    for setting, value in listed(name)["settings"].items():
        if value == REQUIRED and setting not in given:
            raise UserError(f"the data source {name} needs {setting}: write {name}:{setting}=...")
    return registered(DATA, spec)


def listed(name: str) -> dict[str, Any]:
    """A source as it stands in the list."""
    noted = DATA.info(name)
    settings = {
        field.name: REQUIRED if field.default is MISSING else field.default
        for field in fields(noted.target)
        if field.init
    }
    about = (noted.target.__doc__ or "").strip().partition("\n")[0]
    return {"name": name, "about": about, "paper": noted.paper, "settings": settings}


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
