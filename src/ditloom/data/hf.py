"""Images of the Hugging Face `datasets` library, from the hub or saved on disk (an optional extra)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditloom.contracts.data import Example, SourceInfo
from ditloom.contracts.errors import MissingExtra, UnknownName, UserError
from ditloom.contracts.registry import register
from ditloom.data.images import CorruptImage, centre_crop, decode, on_white, to_array


@register("hf")
@dataclass(eq=False)
class HuggingFace:
    """A `datasets.Dataset` with an image column; no code of the data set is run.

    dataset: hub name, or a folder written by `save_to_disk`.  split: as the data set names it.  image, label,
    caption: column names; label and caption default to the columns of the usual names.  size: side of the centre
    crop, None to leave images as they are.
    """

    dataset: str
    split: str = "train"
    subset: str | None = None
    image: str = "image"
    label: str | None = None
    caption: str | None = None
    size: int | None = 64
    channels: int = 3
    info: SourceInfo = field(init=False)

    def __post_init__(self) -> None:
        table = self._opened()
        columns = table.column_names
        for given in filter(None, (self.image, self.label, self.caption)):
            if given not in columns:
                raise UnknownName("column", given, columns)
        self._label = self.label or _first_of(("label", "labels", "fine_label", "class"), columns)
        self._caption = self.caption or _first_of(("caption", "text", "prompt"), columns)
        names = getattr(table.features[self._label], "names", None) if self._label else None
        self._names: tuple[str, ...] | None = tuple(names) if names else None
        self.table = _undecoded(table, self.image)
        size = None if self.size is None else (self.size, self.size)
        licence = table.info.license or "as its owner grants"
        self.info = SourceInfo(self.dataset, self.channels, size, self._names, self._caption is not None, licence)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Example:
        row = self.table[int(index)]
        name = f"{self.dataset}[{self.split}][{index}]"
        picture = on_white(decode(_content(row[self.image], name), name))
        if self.size is not None:
            picture = centre_crop(picture, self.size)
        label = row[self._label] if self._label else None
        label = label if isinstance(label, int) else None
        group = self._names[label] if self._names and label is not None else None
        caption = row[self._caption] if self._caption else None
        return Example(to_array(picture, self.channels), label, caption, group, name)

    def fingerprint(self) -> str:
        """The fingerprint that `datasets` keeps of the table's content and history, and the settings."""
        settings = (self.table._fingerprint, len(self), self._label, self._caption, self.size, self.channels)
        return hashlib.blake2b(repr(settings).encode(), digest_size=16).hexdigest()

    def _opened(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise MissingExtra("datasets", "data", "the data source 'hf'") from error
        on_disk = Path(self.dataset).is_dir() and any(Path(self.dataset).glob("*.json"))
        try:
            found = (
                datasets.load_from_disk(self.dataset)
                if on_disk
                else datasets.load_dataset(self.dataset, self.subset, split=self.split)
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"the data set {self.dataset!r} cannot be opened: {error}") from error
        if isinstance(found, dict):
            if self.split not in found:
                raise UnknownName("split", self.split, found)
            found = found[self.split]
        return found


def _undecoded(table: Any, column: str) -> Any:
    """The image column as bytes, so that one bad image is found when it is read, by name."""
    import datasets

    if not isinstance(table.features[column], datasets.Image):
        raise UserError(f"the column {column!r} holds {table.features[column]}, expected images.")
    return table.cast_column(column, datasets.Image(decode=False))


def _content(cell: dict[str, Any] | None, name: str) -> bytes:
    if not cell:
        raise CorruptImage(name, "the cell is empty")
    if cell.get("bytes"):
        return cell["bytes"]
    try:
        return Path(cell["path"]).read_bytes()
    except OSError as error:
        raise CorruptImage(name, str(error)) from error


def _first_of(names: tuple[str, ...], columns: list[str]) -> str | None:
    return next((name for name in names if name in columns), None)
