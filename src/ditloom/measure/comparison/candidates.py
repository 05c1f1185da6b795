"""What is compared: sets of methods, written 'a:key=1 + b', swept over lists of values, or named by a preset."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import product
from typing import Any

from ditloom.caches.presets import expanded
from ditloom.contracts.errors import UserError
from ditloom.contracts.registries import METHODS
from ditloom.contracts.settings import parse

CONTROL = "fewer-steps"
"""The method that takes fewer steps and nothing else: what every other one has to beat."""
MOST = 500
_PLUS = re.compile(r"\s*\+\s*(?=[a-zA-Z]|$)")


@dataclass(frozen=True)
class Candidate:
    """Methods that run together, as `--using` takes them; none is the plain run. control: the comparison placed it."""

    methods: tuple[str, ...] = ()
    control: bool = False

    @property
    def name(self) -> str:
        """How people write it."""
        return " + ".join(self.methods) or "plain"

    @property
    def names(self) -> tuple[str, ...]:
        """The registered names of its methods."""
        return tuple(parse(method)[0] for method in self.methods)

    @property
    def is_control(self) -> bool:
        """Whether it only takes fewer steps."""
        return self.names == (CONTROL,)

    @property
    def flags(self) -> str:
        """What to add to `ditloom generate`."""
        return " ".join(f"--using {_quoted(method)}" for method in self.methods)


PLAIN = Candidate()


def fewer_steps(steps: int) -> Candidate:
    """The control with so many steps."""
    return Candidate((f"{CONTROL}:steps={steps}",), control=True)


def candidate(text: str) -> Candidate:
    """One set from 'a:key=1 + b', or a stack, 'preset:NAME'; every name and setting is looked at now."""
    methods = tuple(expanded(" ".join(part.split()) for part in _PLUS.split(text.strip()) if part.strip()))
    if not methods:
        raise UserError(f"{text!r} names no method: write a set as 'fora:interval=2' or 'dbcache + guidance-gate'")
    for method in methods:
        check_method(method)
    return Candidate(methods)


def check_method(spec: str) -> None:
    """Refuse a name that is not known, a setting it has not, and a value of the wrong type."""
    from ditloom.training.config import read_settings

    name, given = parse(spec)
    target = METHODS.get(name)
    if isinstance(target, type) and is_dataclass(target):
        read_settings(target, given, f"method {name}")


def swept(text: str) -> list[str]:
    """'a:x=1|2,y=3|4' to the four sets that it stands for; sets without a list stand for themselves."""
    choices = [_of_method(part) for part in _PLUS.split(text.strip()) if part.strip()]
    return [" + ".join(chosen) for chosen in product(*choices)]


def _of_method(spec: str) -> list[str]:
    name, settings = parse(spec)
    values = [_listed(spec, key, value) for key, value in settings.items()]
    chosen = (",".join(f"{key}={v}" for key, v in zip(settings, each, strict=True)) for each in product(*values))
    return [f"{name}:{written}" if written else name for written in chosen]


def _listed(spec: str, key: str, value: Any) -> list[Any]:
    if not isinstance(value, str) or "|" not in value:
        return [value]
    values = [part.strip() for part in value.split("|")]
    if not all(values):
        raise UserError(f"{spec!r}: the list of {key} has an empty place; write {key}=0.05|0.1")
    return values


def candidates(sets: Iterable[str] = (), sweeps: Iterable[str] = (), preset: Sequence[str] = ()) -> list[Candidate]:
    """All sets once, in the order they were asked for: written ones, swept ones, those of a preset."""
    texts = [*sets, *(text for sweep in sweeps for text in swept(sweep)), *preset]
    if not texts:
        raise UserError("nothing to compare: give --sets 'fora:interval=2' ..., --sweep or --preset caches")
    if len(texts) > MOST:
        raise UserError(f"{len(texts)} sets are too many to compare at once; at most {MOST}")
    found: dict[tuple[str, ...], Candidate] = {}
    for text in texts:
        made = candidate(text)
        found.setdefault(tuple(sorted(made.methods)), made)
    return list(found.values())


def about(name: str) -> str:
    """What a method does in a line: what its registration says in plain words, or the start of its docstring."""
    noted = METHODS.info(name)
    if noted.facts.get("plain"):
        return str(noted.facts["plain"])
    text = " ".join((noted.target.__doc__ or "").partition("\n\n")[0].replace("`", "").split())
    sentence = re.split(r"(?<=[.;])\s(?=[A-Z])", text)[0]
    return sentence.rstrip(".") + "." if sentence else ""


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w:.=,-]+", text) else f"'{text}'"
