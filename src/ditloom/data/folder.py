"""Images of a folder, tar or zip, with classes or captions: the source for one's own pictures."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from ditloom.contracts.data import Example, SourceInfo
from ditloom.contracts.registry import register
from ditloom.data.archive import Files, open_files
from ditloom.data.images import centre_crop, decode, on_white, to_array
from ditloom.data.listing import Row, class_names, rows_of


@register("folder")
@dataclass(eq=False)
class Folder:
    """A folder, `.tar[.gz|.bz2|.xz]` or `.zip` of images, read in place and never extracted.

    path: the folder or archive.  split: keep one split (a top folder, or a value of the table's column).  size: side
    of the centre crop, None to leave each image as it is.  channels: 3, or 1 for grey.  labels: "auto", "table"
    (captions.jsonl, metadata.jsonl, metadata.csv), "texts" (x.txt beside x.png), "classes" (folders), "none".
    classes: names in the order of their numbers, default all that occur.
    """

    path: Path
    split: str | None = None
    size: int | None = 64
    channels: int = 3
    labels: str = "auto"
    classes: tuple[str, ...] | None = None
    info: SourceInfo = field(init=False)
    rows: list[Row] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.files: Files = open_files(self.path)
        self.rows = rows_of(self.files, self.labels, self.split)
        found = class_names(self.rows, self.classes)
        self._label = {name: number for number, name in enumerate(found or ())}
        size = None if self.size is None else (self.size, self.size)
        captioned = any(row.caption is not None for row in self.rows)
        self.info = SourceInfo(Path(self.path).name, self.channels, size, found, captioned, "as its owner grants")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        picture = on_white(decode(self.files.read(row.file), row.file))
        if self.size is not None:
            picture = centre_crop(picture, self.size)
        label = None if row.label is None else self._label[row.label]
        return Example(to_array(picture, self.channels), label, row.caption, row.group, row.file)

    def fingerprint(self) -> str:
        """Hash of the files (see `Files.fingerprint`) and of the settings."""
        settings = (self.split, self.size, self.channels, self.labels, self.info.classes)
        return hashlib.blake2b(f"{self.files.fingerprint()} {settings}".encode(), digest_size=16).hexdigest()
