"""Arguments to a command object: tyro reads them; mistakes become one sentence that names the nearest option."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from difflib import get_close_matches
from itertools import takewhile
from typing import TypeVar, get_type_hints

import tyro

from ditloom.cli.command import Command
from ditloom.contracts.errors import UserError

C = TypeVar("C", bound=Command)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
HELP = frozenset(("-h", "--help"))


class UnknownOption(UserError):
    """An option that a command has not; the nearest are found by their words, without the dashes that all share."""

    def __init__(self, command: str, given: str, known: Iterable[str]):
        words = {flag.lstrip("-"): flag for flag in sorted(known)}
        near = [words[word] for word in get_close_matches(given.strip("-").casefold(), words, n=2, cutoff=0.6)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(words.values())}"
        super().__init__(f"unknown option {given} of {command}: {hint}")


def parsed(command: type[C], name: str, arguments: Sequence[str]) -> C:
    """The command with its options filled in; `SystemExit(0)` after --help."""
    for flag in _flags_in(arguments):
        if flag not in known_flags(command):
            raise UnknownOption(name, flag, known_flags(command) - HELP)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(
                command, prog=f"ditloom {name}", args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit as ended:
        if not ended.code:
            raise
        raise UserError(f"{sentence_of(told.getvalue())}; ditloom {name} --help lists the options") from None


def known_flags(command: type[Command]) -> frozenset[str]:
    """Every option, as it is written."""
    hints = get_type_hints(command, include_extras=True)
    named = [f.name for f in fields(command) if tyro.conf.Positional not in getattr(hints[f.name], "__metadata__", ())]
    return HELP | {f"--{name.replace('_', '-')}" for name in named}


def _flags_in(arguments: Sequence[str]) -> Iterator[str]:
    """What looks like an option: --word, -w; not -1.5, and nothing after a bare --."""
    for argument in arguments:
        if argument == "--":
            return
        if argument.startswith("--") or (argument.startswith("-") and argument[1:2].isalpha()):
            yield argument.partition("=")[0].replace("_", "-")


def sentence_of(box: str) -> str:
    """The complaint inside the frame that tyro draws, from below its title to its next rule or blank line."""
    lines = [line.strip("│ ") for line in COLOUR.sub("", box).splitlines()]
    title = next((place for place, line in enumerate(lines) if line.startswith(("╭", "---"))), len(lines))
    said = takewhile(lambda line: line and not line.startswith(("╰", "─", "---")), lines[title + 1 :])
    return " ".join(said).rstrip(".").removeprefix("Error parsing ") or "the options could not be read"
