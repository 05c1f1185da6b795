"""Where a comparison is kept while it grows: a row is written when it is whole, so that a killed one goes on."""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ditloom.contracts.errors import UserError
from ditloom.contracts.metric import Protocol
from ditloom.measure.comparison.candidates import Candidate
from ditloom.measure.comparison.row import Row
from ditloom.measure.drawing import as_array, as_picture
from ditloom.measure.evidence import Pictures
from ditloom.training.durable import explained, json_bytes, replace_file

RECORD = "protocol.json"


@dataclass(frozen=True)
class Folder:
    """`protocol.json`, and for every finished set `sets/<key>.json` with its pictures in `pictures/<key>/`."""

    path: Path

    def claim(self, protocol: Protocol) -> None:
        """Write the protocol into a fresh folder, or see that it is the one there."""
        wanted = json.loads(json.dumps({**asdict(protocol), "hash": protocol.hash}))
        record = self.path / RECORD
        with explained("write to", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "sets").mkdir(exist_ok=True)
            if not record.exists():
                replace_file(record, [json_bytes(wanted)])
        found = _read(record) or {}
        if found != wanted:
            unlike = ", ".join(_unlike(wanted, found)) or "protocol"
            raise UserError(f"{self.path} holds a comparison with another {unlike}: name another folder with --out")

    def row(self, candidate: Candidate) -> Row | None:
        """The finished row of a set, or None."""
        values = _read(self._record(candidate))
        return None if values is None else Row.from_dict(values)

    def pictures(self, candidate: Candidate) -> Pictures:
        """The pictures of a finished set, uint8 [N, H, W, C]."""
        files = sorted(self._pictures(candidate).glob("[0-9]*.png"))
        try:
            return np.stack([as_array(Image.open(file)) for file in files])
        except (OSError, ValueError) as error:
            raise UserError(
                f"the pictures in {self._pictures(candidate)} cannot be read: remove that folder"
            ) from error

    def keep(self, candidate: Candidate, row: Row, pictures: Pictures | None) -> None:
        """Write a set's pictures and then, as the sign that it is whole, its row."""
        with explained("write to", self.path):
            if pictures is not None:
                folder = self._pictures(candidate)
                folder.mkdir(parents=True, exist_ok=True)
                for index, picture in enumerate(pictures):
                    packed = io.BytesIO()
                    as_picture(picture).save(packed, "PNG", optimize=True)
                    replace_file(folder / f"{index:06d}.png", [packed.getvalue()])
            replace_file(self._record(candidate), [json_bytes(row.to_dict())])

    def _record(self, candidate: Candidate) -> Path:
        return self.path / "sets" / f"{_key(candidate)}.json"

    def _pictures(self, candidate: Candidate) -> Path:
        return self.path / "pictures" / _key(candidate)


def _key(candidate: Candidate) -> str:
    """A file name that people can read and no two sets share."""
    digest = hashlib.blake2b(" + ".join(sorted(candidate.methods)).encode(), digest_size=4).hexdigest()
    return f"{re.sub(r'[^a-zA-Z0-9.]+', '-', candidate.name)[:60].strip('-')}-{digest}"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _unlike(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What differs, in words."""
    one, other = ({**side, **side.get("extra", {}), "extra": None, "hash": None} for side in (wanted, found))
    return sorted(name.replace("_", " ") for name in one.keys() | other.keys() if one.get(name) != other.get(name))
