"""Run benchmarks by name, or all: python -m benchmarks [dit_speed] [overhead] ..."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py") if "def main()" in path.read_text())


def main() -> None:
    """Run what was asked for."""
    unknown = [name for name in sys.argv[1:] if name not in NAMES]
    if unknown:
        raise SystemExit(f"unknown benchmark {unknown[0]!r}: there are {', '.join(NAMES)}")
    for name in sys.argv[1:] or NAMES:
        print(f"== {name}", flush=True)
        import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
