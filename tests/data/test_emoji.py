"""The emoji set that ships, and how packs are built from tarballs."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.data import emoji_art
from ditloom.data.emoji import SHIPPED, Emoji
from ditloom.data.emoji_art import ART, EMOJIBASE, build_pack, codepoint_key, split_of
from ditloom.data.fetch import sha256_of
from ditloom.data.images import decode


def test_the_shipped_set() -> None:
    assert SHIPPED.stat().st_size < 9e6
    everything, train, held_out = Emoji("all"), Emoji("train"), Emoji("held-out")
    assert (len(everything), len(train), len(held_out)) == (1599, 1436, 163)
    captions = [{source[i].caption for i in range(len(source))} for source in (train, held_out)]
    assert not captions[0] & captions[1] and len(captions[0] | captions[1]) == 1599
    assert everything.info.classes == (
        "activities", "animals & nature", "food & drink", "objects", "people & body", "smileys & emotion",
        "symbols", "travel & places",
    )  # fmt: skip


def test_every_shipped_picture_is_sound() -> None:
    source = Emoji("all")
    for index, row in enumerate(source.rows):
        data = source.files.read(row.file)
        assert data[12:16] == b"VP8L", "lossless"
        assert decode(data, row.file).size == (64, 64) and decode(data, row.file).mode == "RGB"
        assert row.caption and row.group and source.texts(index)[0] == row.caption


def test_known_captions_show_what_they_say() -> None:
    source = Emoji("all")
    at = {row.caption: index for index, row in enumerate(source.rows)}
    heart, apple = source[at["red heart"]], source[at["green apple"]]
    assert (heart.group, apple.group) == ("smileys & emotion", "food & drink")
    inked = [e.image[e.image.min(-1) < 200].mean(0) for e in (heart, apple)]
    assert inked[0].argmax() == 0 and inked[1].argmax() == 1
    assert heart.image[0, 0].tolist() == [255, 255, 255]


def test_the_split_is_the_hash_of_the_code_point() -> None:
    with zipfile.ZipFile(SHIPPED) as pack:
        rows = [json.loads(line) for line in pack.read("captions.jsonl").decode().splitlines()]
    assert all(row["split"] == split_of(row["codepoint"]) for row in rows)
    shares = [split_of(f"{n:x}") == "held-out" for n in range(20_000)]
    assert abs(np.mean(shares) - 0.1) < 0.008


def test_size_and_template() -> None:
    source = Emoji(size=32, template="{label}, an emoji of {group} in the {style} style")
    assert source[0].image.shape == (32, 32, 3)
    assert source[0].caption == "mahjong red dragon, an emoji of activities in the fluent style"
    assert source.fingerprint() != Emoji(size=32).fingerprint() != Emoji().fingerprint()


def test_wrong_settings() -> None:
    with pytest.raises(UnknownName, match="did you mean 'held-out'"):
        Emoji("heldout")
    with pytest.raises(UnknownName, match="did you mean 'noto'"):
        Emoji(styles=("notto",))
    with pytest.raises(UserError, match="cannot be filled in"):
        Emoji(template="{name}")


@pytest.mark.parametrize("code", ["0023-FE0F-20E3", "23-20e3", "0023-20e3"])
def test_one_emoji_one_key(code: str) -> None:
    assert codepoint_key(code) == "23-20e3"


def drawing(colour: str) -> bytes:
    picture = Image.new("RGBA", (8, 8), colour)
    picture.putpixel((0, 0), (0, 0, 0, 0))
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def tarball(path: Path, files: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return sha256_of(path)


@pytest.fixture
def tarballs(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An apple, a hand in two tones and a flag, from two artists, in the layout of the published packages."""
    groups = [{"order": 1, "message": "people & body"}, {"order": 4, "message": "food & drink"}]
    groups.append({"order": 9, "message": "flags"})
    hand = {"label": "hand", "hexcode": "270B", "group": 1, "tags": ["palm"]}
    emoji = [
        {"label": "red apple", "hexcode": "1F34E", "group": 4, "tags": ["fruit"]},
        hand | {"skins": [{"label": "hand: dark skin tone", "hexcode": "270B-1F3FF"}]},
        {"label": "a flag", "hexcode": "1F3F4", "group": 9},
        {"label": "regional indicator A", "hexcode": "1F1E6"},
    ]
    base = {"package/en/data.json": json.dumps(emoji).encode()}
    base["package/en/messages.json"] = json.dumps({"groups": groups}).encode()
    pinned = replace(EMOJIBASE, sha256=tarball(own_cache / "npm" / EMOJIBASE.file_name, base))
    monkeypatch.setattr(emoji_art, "EMOJIBASE", pinned)
    arts = {}
    for style, colour in (("fluent", "red"), ("noto", "blue")):
        art = ART[style]
        codes = ("1f34e", "270b", "270b-1f3ff", "1f3f4", "00a9")
        files = {f"{art.folder}/{code}.png": drawing(colour) for code in codes} | {"package/README.md": b"x"}
        digest = tarball(own_cache / "npm" / art.tarball.file_name, files)
        arts[style] = replace(art, tarball=replace(art.tarball, sha256=digest))
    monkeypatch.setattr(emoji_art, "ART", arts)


@pytest.mark.usefixtures("tarballs")
def test_build_pack_joins_art_and_labels(tmp_path: Path) -> None:
    entries = build_pack(tmp_path / "a.zip", ("noto", "fluent"), size=4)
    assert [(e.file, e.caption, e.group) for e in entries] == [
        ("noto/1f34e.webp", "red apple", "food & drink"), ("noto/270b.webp", "hand", "people & body"),
        ("fluent/1f34e.webp", "red apple", "food & drink"), ("fluent/270b.webp", "hand", "people & body"),
    ]  # fmt: skip
    build_pack(tmp_path / "b.zip", ("noto", "fluent"), size=4)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


@pytest.mark.usefixtures("tarballs")
def test_larger_sets_are_built_in_the_cache(own_cache: Path) -> None:
    source = Emoji("all", size=8, styles=("fluent", "noto"), skins=True, template="{label}, {style}")
    assert sorted(source[i].caption or "" for i in range(len(source))) == [
        "hand, fluent", "hand, noto", "hand: dark skin tone, fluent", "hand: dark skin tone, noto",
        "red apple, fluent", "red apple, noto",
    ]  # fmt: skip
    assert source[0].image[0, 0].tolist() == [255] * 3 and source[0].image[4, 4].tolist() == [255, 0, 0]
    assert [p.name for p in (own_cache / "emoji").iterdir()] == ["fluent-noto-skins-1.zip"]
