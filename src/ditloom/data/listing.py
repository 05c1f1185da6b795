"""What the files of a data set say of its images: a table, texts beside them, class folders, or nothing.

A table is `captions.jsonl`, `metadata.jsonl` or `metadata.csv` with a column for the file and any of caption, label,
group, split and tags. Texts are `x.txt` beside `x.png`. Class folders are the first folders below the root.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.data.archive import Files
from ditloom.data.images import SUFFIXES, CorruptImage

TABLES = ("captions.jsonl", "metadata.jsonl", "metadata.csv")
SPLITS = frozenset(("train", "test", "val", "valid", "validation"))
COLUMNS = {
    "file": ("file", "file_name", "image", "path"),
    "caption": ("caption", "text", "prompt"),
    "label": ("label", "class"),
    "group": ("group",),
    "split": ("split",),
    "style": ("style",),
}


@dataclass(frozen=True)
class Row:
    """One image file and what is known of it."""

    file: str
    caption: str | None = None
    label: str | None = None
    group: str | None = None
    split: str | None = None
    style: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Root:
    """The files below one folder of a `Files`, under the names they have there."""

    files: Files
    prefix: str
    names: tuple[str, ...]

    @property
    def images(self) -> list[str]:
        return [name for name in self.names if PurePosixPath(name).suffix.lower() in SUFFIXES]

    @property
    def table(self) -> str | None:
        return next((name for name in TABLES if name in self.names), None)

    def text(self, name: str) -> str:
        try:
            return self.files.read(self.prefix + name).decode("utf-8-sig")
        except (UnicodeDecodeError, CorruptImage) as error:
            raise UserError(f"{name} in {self.files.path} is not readable UTF-8 text: {error}.") from error

    def below(self, folder: str) -> Root:
        inside = tuple(name.removeprefix(f"{folder}/") for name in self.names if name.startswith(f"{folder}/"))
        return Root(self.files, f"{self.prefix}{folder}/", inside)


def rows_of(files: Files, labels: str = "auto", split: str | None = None) -> list[Row]:
    """Every image of a data set; `labels` is "auto" or a key of `LISTINGS`."""
    root = _inner(Root(files, "", tuple(files.sizes)))
    tops = {name.split("/")[0] for name in root.images if "/" in name}
    if split is not None and split in tops and root.table is None:
        root, split = root.below(split), None
    elif split is None and root.table is None and tops and tops <= SPLITS:
        raise UserError(f"{files.path} is divided into {_listed(tops)}: choose one, as in split={min(tops)!r}.")
    rows = _listing(labels, root)(root)
    if not rows:
        raise UserError(f"{files.path} holds no image; expected files ending in {_listed(SUFFIXES)}.")
    chosen = rows if split is None else _of_split(rows, split, tops, files)
    return [replace(row, file=root.prefix + row.file) for row in chosen]


def class_names(rows: Iterable[Row], given: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The classes in order: as given, by number where all are numbers, else by name."""
    found = {row.label for row in rows if row.label is not None}
    if given is None:
        return tuple(sorted(found, key=lambda n: (not n.isdecimal(), int(n) if n.isdecimal() else 0, n))) or None
    for name in sorted(found - set(given)):
        raise UnknownName("class", name, given)
    if missing := [name for name in given if name not in found]:
        raise UserError(f"no image is of class {_listed(missing)}; the data holds {_listed(found)}.")
    return given


def from_table(root: Root) -> list[Row]:
    """Rows of the table, in its order; each must name an image that is there."""
    name = root.table
    if name is None:
        raise UserError(f"{root.files.path} has no table; expected one of {_listed(TABLES)}.")
    records = _csv_records if name.endswith(".csv") else _json_records
    return [_table_row(root, f"line {number} of {name}", record) for number, record in records(root.text(name), name)]


def from_texts(root: Root) -> list[Row]:
    """`x.txt` beside every `x.png`."""
    known, images = set(root.names), root.images
    without = [name for name in images if _text_name(name) not in known]
    if without:
        raise UserError(f"{len(without)} of {len(images)} images have no caption, the first is {without[0]}.")
    return [Row(name, caption=root.text(_text_name(name)).strip()) for name in images]


def from_folders(root: Root) -> list[Row]:
    """The first folder of each image is its class."""
    loose = [name for name in root.images if "/" not in name]
    if loose:
        raise UserError(f"{loose[0]} lies outside the class folders: move it into one, or give labels='none'.")
    return [Row(name, label=name.split("/")[0]) for name in root.images]


def unlabelled(root: Root) -> list[Row]:
    return [Row(name) for name in root.images]


LISTINGS: Mapping[str, Callable[[Root], list[Row]]] = {
    "table": from_table,
    "texts": from_texts,
    "classes": from_folders,
    "none": unlabelled,
}


def _listing(labels: str, root: Root) -> Callable[[Root], list[Row]]:
    if labels in LISTINGS:
        return LISTINGS[labels]
    if labels != "auto":
        raise UnknownName("kind of labels", labels, ["auto", *LISTINGS])
    known = set(root.names)
    if root.table is not None:
        return from_table
    if any(_text_name(name) in known for name in root.images):
        return from_texts
    return from_folders if any("/" in name for name in root.images) else unlabelled


def _of_split(rows: list[Row], split: str, tops: set[str], files: Files) -> list[Row]:
    chosen = [row for row in rows if row.split == split]
    known = {row.split for row in rows if row.split} or tops & SPLITS
    if not chosen and known:
        raise UnknownName("split", split, known)
    if not chosen:
        raise UserError(f"{files.path} is not divided into splits: leave split={split!r} away.")
    return chosen


def _inner(root: Root) -> Root:
    """Steps into a sole top folder that is only a wrapper: one with folders or a table in it, but no bare images."""
    while root.table is None and len(tops := {name.split("/")[0] for name in root.names}) == 1:
        inside = root.below(tops.pop())
        bare = any("/" not in name for name in inside.images)
        if not inside.names or (bare and inside.table is None):
            break
        root = inside
    return root


def _table_row(root: Root, where: str, record: Mapping[str, Any]) -> Row:
    values = {key: _first_value(record, names) for key, names in COLUMNS.items()}
    file = values.pop("file")
    if file is None:
        raise UserError(f"{where} names no file; expected a column {_listed(COLUMNS['file'])}.")
    listed = root.files.find(root.prefix + str(file))
    if listed is None:
        raise UserError(f"{where} names {file!r}, which is not in {root.files.path}.")
    tags = record.get("tags") or ()
    tags = tuple(tags.split(",")) if isinstance(tags, str) else tuple(map(str, tags))
    known = {key: None if value is None else str(value) for key, value in values.items()}
    return Row(listed.removeprefix(root.prefix), tags=tags, **known)


def _first_value(record: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((record[name] for name in names if record.get(name) not in (None, "")), None)


def _json_records(text: str, name: str) -> list[tuple[int, Mapping[str, Any]]]:
    records: list[tuple[int, Mapping[str, Any]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"line {number} of {name} is not JSON: {error}.") from error
        if not isinstance(record, dict):
            raise UserError(f"line {number} of {name} is not a JSON object.")
        records.append((number, record))
    return records


def _csv_records(text: str, name: str) -> list[tuple[int, Mapping[str, Any]]]:
    return list(enumerate(csv.DictReader(io.StringIO(text)), 2))


def _text_name(image: str) -> str:
    return str(PurePosixPath(image).with_suffix(".txt"))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
