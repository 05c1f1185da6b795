"""What a command is: a dataclass whose fields are its options, and the answer that running it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec


def _value(metavar: str, read: Callable[[str], Any], what: str) -> PrimitiveConstructorSpec[Any]:
    """How tyro reads one word; the default of an option that may be absent is told in its help."""

    def instance(words: list[str]) -> Any:
        try:
            return read(words[0])
        except ValueError:
            raise ValueError(f"expected {what}, got {words[0]!r}") from None

    def text(value: Any) -> list[str]:
        return ["none" if value is None else str(value)]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=instance,
        is_instance=lambda value: True,
        str_from_instance=text,
    )


WHOLE, QUIET = _value("N", int, "a whole number"), arg(help_behavior_hint="")
Whole = Annotated[int, WHOLE]
OptionalWhole = Annotated[int | None, WHOLE, QUIET]
OptionalNumber = Annotated[float | None, _value("X", float, "a number"), QUIET]
OptionalText = Annotated[str | None, _value("TEXT", str, "text"), QUIET]
OptionalPath = Annotated[Path | None, _value("PATH", Path, "a path"), QUIET]


@dataclass(frozen=True)
class Answer:
    """What a command found: plain values for programs, lines and rich tables for people.

    quiet: another process of the same launch gives the answer.
    """

    document: Any
    shown: Sequence[Any] = ()
    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """One command. Its fields become options, its docstring and the strings under its fields their help."""

    json: bool = False
    """print one JSON document to the standard output and nothing else"""

    @abstractmethod
    def run(self) -> Answer:
        """Do it. A mistake of the user's is a `UserError`."""
