"""`metrics.jsonl`: one JSON object a line, only ever appended to.

A kill may tear the last line; the next writer starts a new one and readers pass over the torn one. A run that resumes
from image n appends `{"resumed": n}`, and readers drop what was logged beyond n before it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ditloom.training.durable import explained


class MetricsLog:
    """The writer. Every line is one `write` to the operating system, so it is whole or torn, never mixed."""

    def __init__(self, path: Path, resumed_at: int | None = None):
        self.path = path
        with explained("open", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            if _is_torn(self._handle):
                os.write(self._handle, b"\n")
        if resumed_at is not None:
            self._append({"resumed": resumed_at})

    def write(self, images: int, **values: Any) -> None:
        """Log values at `images` images seen; numbers that are not finite are logged as null."""
        self._append({"images": images, **{name: _plain(value) for name, value in values.items()}})

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with explained("write to", self.path):
            written = os.write(self._handle, line)
            if written < len(line):
                os.write(self._handle, line[written:])

    def close(self) -> None:
        """Sync to disk and close."""
        with explained("write to", self.path):
            os.fsync(self._handle)
        os.close(self._handle)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records that still hold, in order of images: torn lines and lines undone by a resume are left out."""
    records: list[dict[str, Any]] = []
    for record in _lines(path):
        if "resumed" in record:
            records = [kept for kept in records if kept["images"] <= record["resumed"]]
        elif "images" in record:
            records.append(record)
    return records


def series(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Images and values of one metric, where it was logged and finite."""
    present = [(record["images"], record[name]) for record in records if record.get(name) is not None]
    return [images for images, _ in present], [value for _, value in present]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def _is_torn(handle: int) -> bool:
    end = os.lseek(handle, 0, os.SEEK_END)
    return end > 0 and os.pread(handle, 1, end - 1) != b"\n"


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
