"""Captioned emoji art out of npm tarballs: Fluent 3D, Noto and Twemoji joined with the emojibase labels.

A *pack* is an uncompressed zip of picture files beside one `captions.jsonl`, a line a picture: `file`, `caption`,
`tags`, `group`, `codepoint`, `style`, `split`. `recipes/pack_emoji.py` builds the one shipped with the package;
`build_pack` builds larger ones (256-pixel originals, three styles, skin tones) in the user's cache.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ditloom.data.fetch import Tarball, cache_folder
from ditloom.data.images import on_white, shrink

HELD_OUT_SHARE = 0.1
PACK_VERSION = 1
LEFT_OUT = ("flags", "components")  # flags are in another style and of unchecked origin; components are swatches
EMOJIBASE = Tarball("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")


@dataclass(frozen=True)
class Art:
    """One set of drawings: where its pictures lie in which tarball, and under what terms."""

    style: str
    tarball: Tarball
    folder: str
    licence: str


ART: Mapping[str, Art] = {
    "fluent": Art(
        "fluent",
        Tarball(
            "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
        ),
        "package/assets",
        "MIT (Microsoft Fluent Emoji)",
    ),
    "noto": Art(
        "noto",
        Tarball(
            "emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
        ),
        "package/img/google/64",
        "Apache-2.0 (Google Noto Emoji)",
    ),
    "twemoji": Art(
        "twemoji",
        Tarball(
            "emoji-datasource-twitter", "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
        ),
        "package/img/twitter/64",
        "CC-BY-4.0 (Twitter, Inc. and other contributors)",
    ),
}


@dataclass(frozen=True)
class Entry:
    """What is known of one picture; the row of `captions.jsonl`."""

    file: str
    caption: str
    tags: tuple[str, ...]
    group: str
    codepoint: str
    style: str
    split: str


def codepoint_key(hexcode: str) -> str:
    """`0023-FE0F-20E3` and `23-20e3` name the same emoji: lower case, no variation selector, no leading zeros."""
    parts = (part.lower().lstrip("0") for part in hexcode.split("-"))
    return "-".join(part for part in parts if part != "fe0f")


def split_of(key: str) -> str:
    """The split of a code point by a hash that never changes: a tenth is held out, the same in every style."""
    digest = hashlib.blake2b(f"emoji held-out {key}".encode(), digest_size=8).digest()
    return "held-out" if int.from_bytes(digest) < HELD_OUT_SHARE * 2**64 else "train"


def labels(cache: Path | None = None, skins: bool = False) -> dict[str, Entry]:
    """Code point key -> label, tags and group from emojibase, without `LEFT_OUT`."""
    with tarfile.open(EMOJIBASE.path(cache)) as tar:
        emoji, messages = (_member_json(tar, f"package/en/{name}.json") for name in ("data", "messages"))
    groups = {group["order"]: group["message"] for group in messages["groups"]}
    found = {}
    for row in emoji:
        group = groups.get(row.get("group"))
        if group is None or group in LEFT_OUT:
            continue
        base = codepoint_key(row["hexcode"])
        for variant in [row, *(row.get("skins", ()) if skins else ())]:
            key = codepoint_key(variant["hexcode"])
            tags = tuple(row.get("tags", ()))
            found[key] = Entry("", variant["label"], tags, group, key, "", split_of(base))
    return found


def pictures(art: Art, cache: Path | None = None) -> Iterator[tuple[str, str, bytes]]:
    """(code point key, file suffix, bytes) of each drawing, in the order of the tarball."""
    with tarfile.open(art.tarball.path(cache)) as tar:
        for member in tar:
            path = Path(member.name)
            if member.isfile() and str(path.parent) == art.folder:
                file = tar.extractfile(member)
                assert file is not None
                yield codepoint_key(path.stem), path.suffix, file.read()


def local_pack(styles: tuple[str, ...], skins: bool = False) -> Path:
    """The pack of these styles' original files in the user's cache, built on first use."""
    target = cache_folder() / "emoji" / f"{'-'.join(styles)}{'-skins' if skins else ''}-{PACK_VERSION}.zip"
    if not target.exists():
        build_pack(target, styles, skins=skins)
    return target


def build_pack(
    path: Path,
    styles: tuple[str, ...] = ("fluent",),
    size: int | None = None,
    skins: bool = False,
    cache: Path | None = None,
) -> list[Entry]:
    """Write a pack; `size` shrinks to lossless RGB on white, None keeps the original files (256, 64 and 64 pixels)."""
    known = labels(cache, skins)
    rows: dict[tuple[str, str], tuple[Entry, bytes]] = {}
    for style in styles:
        for key, suffix, data in pictures(ART[style], cache):
            if key in known:
                data, suffix = (data, suffix) if size is None else (_shrunk(data, size), ".webp")
                about = asdict(known[key]) | {"file": f"{style}/{key}{suffix}", "style": style}
                rows[style, key] = Entry(**about), data
    ordered = [rows[at] for at in sorted(rows, key=lambda at: (styles.index(at[0]), at[1]))]
    _write_zip(path, ordered)
    return [entry for entry, _ in ordered]


def _member_json(tar: tarfile.TarFile, name: str) -> Any:
    file = tar.extractfile(name)
    assert file is not None
    return json.load(file)


def _shrunk(data: bytes, size: int) -> bytes:
    picture = shrink(on_white(Image.open(io.BytesIO(data))), size)
    packed = io.BytesIO()
    picture.save(packed, "WEBP", lossless=True, quality=100, method=6)
    return packed.getvalue()


def _write_zip(path: Path, rows: list[tuple[Entry, bytes]]) -> None:
    """Stored, sorted and undated, so that equal content gives an equal file; written beside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry, _ in rows)
    with open(beside, "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as pack:
            pack.writestr(zipfile.ZipInfo("captions.jsonl"), lines)
            for entry, data in rows:
                pack.writestr(zipfile.ZipInfo(entry.file), data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
