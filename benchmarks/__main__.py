"""Run benchmarks by name, or all: python -m benchmarks [dit_speed] [overhead]."""

from __future__ import annotations

import sys
from importlib import import_module

NAMES = ("dit_speed", "overhead")


def main() -> None:
    """Run what was asked for."""
    for name in sys.argv[1:] or NAMES:
        print(f"== {name}", flush=True)
        import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
