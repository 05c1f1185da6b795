"""Emoji with captions: the data set that comes with the package, and its larger relatives."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from ditloom.contracts.data import Example, SourceInfo
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.registry import register
from ditloom.data.archive import open_files
from ditloom.data.emoji_art import ART, local_pack
from ditloom.data.images import decode, on_white, shrink, to_array
from ditloom.data.listing import Row, rows_of

SHIPPED = Path(__file__).parents[1] / "assets" / "data" / "emoji64.zip"
SPLITS = ("train", "held-out", "all")
ASKED = ("{article} {caption}", "{caption} emoji", "a picture of {article} {caption}")


@register("emoji")
@dataclass(eq=False)
class Emoji:
    """1,599 Fluent 3D emoji (no flags, no skin tones) on white with the emojibase labels as captions.

    split: "train", "held-out" (a tenth, by a hash of the code point) or "all".  size: side in pixels; above 64 the
    published drawings (256 pixels for fluent, 64 for the others) are fetched, as to augment from them.  styles: of
    "fluent", "noto", "twemoji"; those other than the shipped first are fetched.  skins: also the five skin tones,
    fetched.  template: the caption, with {label}, {style} and {group} filled in.  Fetching needs npm, once.
    """

    split: str = "train"
    size: int = 64
    styles: tuple[str, ...] = ("fluent",)
    skins: bool = False
    template: str = "{label}"
    info: SourceInfo = field(init=False)
    rows: list[Row] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UnknownName("split", self.split, SPLITS)
        for style in self.styles:
            if style not in ART:
                raise UnknownName("emoji style", style, ART)
        shipped = tuple(self.styles) == ("fluent",) and not self.skins and self.size <= 64
        self.files = open_files(SHIPPED if shipped else local_pack(tuple(self.styles), self.skins))
        rows = rows_of(self.files, "table")
        groups = tuple(sorted({row.group for row in rows if row.group}))
        self._group = {name: number for number, name in enumerate(groups)}
        self.rows = [row for row in rows if self.split in (row.split, "all")]
        self._caption(self.rows[0])
        licence = "; ".join(["captions MIT", *(ART[style].licence for style in self.styles)])
        self.info = SourceInfo("emoji", 3, (self.size, self.size), groups, True, licence)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        picture = shrink(on_white(decode(self.files.read(row.file), row.file)), self.size)
        return Example(to_array(picture), self._group[row.group or ""], self._caption(row), row.group, row.file)

    def texts(self, index: int) -> tuple[str, ...]:
        """All wordings for one picture: its caption, ways in which people ask for it, then it with each tag."""
        row = self.rows[index]
        caption = self._caption(row)
        article = "an" if caption[:1].lower() in "aeiou" else "a"
        asked = tuple(form.format(caption=caption, article=article) for form in ASKED)
        return (caption, *asked, *(f"{caption}, {tag}" for tag in row.tags if tag not in caption))

    def fingerprint(self) -> str:
        settings = (self.split, self.size, self.styles, self.template, ASKED)
        return hashlib.blake2b(f"{self.files.fingerprint()} {settings}".encode(), digest_size=16).hexdigest()

    def _caption(self, row: Row) -> str:
        try:
            return self.template.format(label=row.caption, style=row.style, group=row.group)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"template={self.template!r} cannot be filled in: use {{label}}, {{style}} and {{group}} only."
            ) from error
