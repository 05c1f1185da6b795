"""Run benchmarks by name, or all: python -m benchmarks [dit_speed] [families [arguments ...]] ..."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py") if "def main(" in path.read_text())


def asked(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Every benchmark that is named, with the words behind it up to the next one."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word in NAMES:
            found.append((word, []))
        elif not found or not signature(import_module(f"benchmarks.{found[-1][0]}").main).parameters:
            raise SystemExit(f"unknown benchmark {word!r}: there are {', '.join(NAMES)}")
        else:
            found[-1][1].append(word)
    return found


def main() -> None:
    """Run what was asked for; the exit status is the worst of theirs."""
    status = 0
    for name, arguments in asked(sys.argv[1:] or NAMES):
        print(f"== {name}", flush=True)
        run = import_module(f"benchmarks.{name}").main
        status = max(status, run(arguments) or 0 if arguments else run() or 0)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
