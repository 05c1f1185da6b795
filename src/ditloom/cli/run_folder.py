"""The folder of one `generate`: settings.json, images/000000.png and on, grid.png.

A picture has its name only when it is whole, so a killed run goes on where it stopped, and any number of processes may
fill one folder. What decides the pictures is kept in settings.json, and a folder of other pictures is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditloom.cli.show import plain
from ditloom.contracts.errors import UserError
from ditloom.training.durable import explained, json_bytes, replace_file, sync_folder, write_file

SETTINGS = "settings.json"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class RunFolder:
    """Pictures 0 to `total` - 1 below `path`."""

    path: Path
    total: int

    @property
    def images(self) -> Path:
        """Where the pictures are."""
        return self.path / "images"

    @property
    def grid(self) -> Path:
        """The grid of the first pictures."""
        return self.path / "grid.png"

    def picture(self, number: int) -> Path:
        """The file of one picture."""
        digits = max(6, len(str(self.total - 1)))
        return self.images / f"{number:0{digits}d}.png"

    def claim(self, record: Mapping[str, Any]) -> None:
        """Write `record` into a fresh folder, or see that the pictures there are the same ones.

        Processes that come at once write the same bytes. Only record["pictures"] must agree.
        """
        with explained("write to", self.path):
            self.images.mkdir(parents=True, exist_ok=True)
            foreign = any(self.images.iterdir())
        found = self.read()
        if found is None and foreign:
            raise UserError(f"{self.images} holds pictures and no {SETTINGS} says which: name another folder")
        if found is None:
            self.write(record)
            return
        wanted, there = plain(record["pictures"]), found.get("pictures", {})
        unlike = sorted(key for key in wanted.keys() | there.keys() if wanted.get(key) != there.get(key))
        if unlike:
            raise UserError(f"{self.path} holds pictures drawn with another {', '.join(unlike)}: name another folder")

    def read(self) -> dict[str, Any] | None:
        """The record, or None in a fresh folder."""
        try:
            return dict(json.loads((self.path / SETTINGS).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / SETTINGS} cannot be read: {error}") from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Replace the record."""
        path = self.path / SETTINGS
        with explained("write", path):
            replace_file(path, [json_bytes(plain(record)) + b"\n"])

    def has(self, numbers: Sequence[int]) -> bool:
        """Whether every one of these pictures is there and whole."""
        return all(_is_whole(self.picture(number)) for number in numbers)

    def keep(self, numbers: Sequence[int], files: Sequence[bytes]) -> None:
        """Write the pictures beside their names, sync them, then name them all."""
        finals = [self.picture(number) for number in numbers]
        beside = [path.with_name(f".{path.name}.part") for path in finals]
        with explained("write to", self.images):
            for path, data in zip(beside, files, strict=True):
                write_file(path, [data])
            for path, final in zip(beside, finals, strict=True):
                os.rename(path, final)
            sync_folder(self.images)


def _is_whole(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False
