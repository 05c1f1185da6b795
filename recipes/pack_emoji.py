"""Builds the emoji data set shipped with the package: Fluent 3D art without flags, 64x64, captioned.

    python recipes/pack_emoji.py [--out FILE] [--size 64]

Needs npm (any version that knows `npm pack`) and the network once; the tarballs are pinned by SHA-256 in
`ditloom.data.fetch` and `ditloom.data.emoji_art`. `--styles fluent noto twemoji` builds a mixed set instead, and
`--size 0` keeps the original files.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from ditloom.data.emoji_art import ART, build_pack

SHIPPED = Path(__file__).parents[1] / "src/ditloom/assets/data/emoji64.zip"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--size", type=int, default=64, help="side in pixels; 0 keeps the original files")
    parser.add_argument("--styles", nargs="+", choices=list(ART), default=["fluent"])
    parser.add_argument("--skins", action="store_true", help="also the five skin tones")
    arguments = parser.parse_args()
    entries = build_pack(arguments.out, tuple(arguments.styles), arguments.size or None, arguments.skins)
    print(f"{arguments.out}: {len(entries)} pictures, {arguments.out.stat().st_size / 1e6:.2f} MB")
    for what in ("style", "split", "group"):
        print(what, dict(Counter(getattr(entry, what) for entry in entries)))


if __name__ == "__main__":
    main()
