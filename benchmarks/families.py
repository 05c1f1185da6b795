"""Every backbone family: inference and a training step, beside diffusers' module where it has the architecture.

python -m benchmarks families [family ...] [--markdown] [--again] [--evidence]

Ours runs in bf16, eager and with frozen compiled blocks; diffusers' module of the same configuration as its users run
it on a CPU, under bf16 autocast, and with its weights cast to bf16. All contenders of a family take turns, bare matrix
products among them. Every family's numbers are kept under runs/benchmarks/families/ as soon as they are there, and
taken from there by a later call on the same machine with the same settings.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import family_turns, machine
from benchmarks.family_configs import CONFIGS
from benchmarks.peers import peer_of
from ditloom.contracts.registries import BACKBONES

FOLDER = Path("runs/benchmarks/families")
EVIDENCE = Path(__file__).parents[1] / "docs/evidence/speeds.yaml"
COMMAND = "OMP_NUM_THREADS={threads} python -m benchmarks families"
KEPT = ("date", "parameters", "gmacs", "tokens", "times")
COLUMNS = {
    "eager img/s": ("eager", "img/s"),
    "frozen img/s": ("frozen", "img/s"),
    "of products": ("frozen", "of floor"),
    "training img/s": ("training", "img/s"),
    "of products, training": ("training", "of floor"),
    "diffusers img/s": ("diffusers", "img/s"),
    "eager / diffusers": ("eager", "over diffusers"),
    "frozen / diffusers": ("frozen", "over diffusers"),
    "eager / diffusers cast": ("eager", "over cast"),
    "training / diffusers": ("training", "over diffusers training"),
}

Row = dict[str, Any]


def protocol() -> dict[str, Any]:
    """What numbers must share to stand in one table."""
    return {
        "machine": machine.in_words(),
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16",
        "batch": family_turns.BATCH,
        "turns": family_turns.RUNS,
        "torch": str(torch.__version__),
        "diffusers": version("diffusers") if find_spec("diffusers") else "none",
    }


def row_of(name: str, again: bool = False) -> Row:
    """A family's numbers: those that are kept, if they were taken as they would be now, or else new ones."""
    if not again and (kept := kept_row(name)) is not None:
        return kept
    torch.manual_seed(0)
    torch.compiler.reset()
    numbers = family_turns.measured(CONFIGS[name], peer_of(name))
    row = {**settings_of(name), "date": datetime.date.today().isoformat(), **numbers}
    path = FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(row, indent=2), encoding="utf-8")
    beside.replace(path)
    return row


def settings_of(name: str) -> Row:
    """What a family's numbers were taken with."""
    return {"protocol": protocol(), "config": repr(CONFIGS[name])}


def kept_row(name: str) -> Row | None:
    """A family's numbers, if they are kept and were taken as they would be now."""
    path = FOLDER / f"{name}.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return kept if all(kept.get(key) == value for key, value in settings_of(name).items()) else None


def cells(row: Row) -> list[str]:
    """A row of the table, a dash where there is nothing to compare with."""
    found = (row["times"].get(who, {}).get(what) for who, what in COLUMNS.values())
    return ["-" if number is None else f"{number:.2f}" for number in found]


def markdown(rows: Mapping[str, Row]) -> str:
    """The table of all families."""
    head = [f"| family | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    return "\n".join([*head, *(f"| {name} | {' | '.join(cells(row))} |" for name, row in rows.items())])


def line(row: Row) -> str:
    """The same in a line."""
    return ", ".join(f"{column} {cell}" for column, cell in zip(COLUMNS, cells(row), strict=True) if cell != "-")


def evidence(rows: Mapping[str, Row]) -> str:
    """The same numbers as docs/evidence/ keeps them."""
    told = {**protocol(), "command": COMMAND.format(threads=torch.get_num_threads())}
    families = {name: _rounded({k: row[k] for k in KEPT}) for name, row in rows.items()}
    document = {"speed": {"protocol": told, "families": families}}
    return yaml.safe_dump(document, sort_keys=False, width=1000, default_flow_style=None)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


def wanted(arguments: Sequence[str]) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks families", description=__doc__)
    parser.add_argument("family", nargs="*", help="default: every registered family")
    parser.add_argument("--markdown", action="store_true", help="a table instead of JSON")
    parser.add_argument("--again", action="store_true", help="measure also what is kept already")
    parser.add_argument(
        "--evidence", action="store_true", help=f"write all that is kept to {EVIDENCE.name}, for the page of portraits"
    )
    asked = parser.parse_args(arguments)
    asked.family = asked.family or BACKBONES.names()
    for name in asked.family:
        if name not in CONFIGS:
            parser.error(f"no family {name!r} to time: there are {', '.join(CONFIGS)}")
    return asked


def main(arguments: Sequence[str] = ()) -> int:
    """Time the families one after the other; 1 if one of them failed."""
    asked, rows, failed = wanted(arguments), dict[str, Row](), dict[str, str]()
    for i, name in enumerate(asked.family, start=1):
        try:
            rows[name] = row_of(name, asked.again)
            say(f"{i}/{len(asked.family)} {name}: {line(rows[name])}")
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            say(f"{i}/{len(asked.family)} {name} failed\n{traceback.format_exc()}")
    print(markdown(rows) if asked.markdown else json.dumps({"families": rows, "failed": failed}, indent=2))
    if asked.evidence:
        kept = {name: row for name in BACKBONES.names() if (row := kept_row(name)) is not None}
        EVIDENCE.write_text(evidence(kept), encoding="utf-8")
    return int(bool(failed))
