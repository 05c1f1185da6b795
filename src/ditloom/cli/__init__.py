"""The command line: one file a command in `commands/`; this file knows only their names, and imports nothing heavy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent / "commands"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for what the user can put right, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(overview())
        return 0
    if given[0] == "--version":
        print(f"ditloom {_version()}")
        return 0
    from ditloom.cli.running import run

    return run(given[0], given[1:])


def overview() -> str:
    """What `ditloom --help` prints: every command with the first line of its file."""
    import ditloom

    about = {path.stem: _first_line(path) for path in sorted(FOLDER.glob("[!_]*.py"))}
    width = max(map(len, about))
    listed = "\n".join(f"  {name:{width}}  {line}" for name, line in about.items())
    return (
        f"ditloom {_version()} - {str(ditloom.__doc__).partition(': ')[2]}\n\n"
        f"usage: ditloom COMMAND [options]\n\n{listed}\n\n"
        "ditloom COMMAND --help lists a command's options; every command takes --json."
    )


def _first_line(path: Path) -> str:
    with open(path, encoding="utf-8") as file:
        return file.readline().strip().strip('"')


def _version() -> str:
    import ditloom

    return ditloom.__version__
