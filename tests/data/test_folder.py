"""One's own pictures: folder, zip and tar; classes, captions, splits; what leads outside is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from ditloom.contracts.data import DataSource
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.data.archive import open_files
from ditloom.data.folder import Folder
from ditloom.data.images import CorruptImage

Container = Callable[[Mapping[str, bytes]], Path]
Picture = Callable[..., bytes]


def lines(*rows: dict[str, object]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def test_classes_from_folders(container: Container, picture: Picture) -> None:
    files = {f"{kind}/{n}.png": picture(n) for kind in ("zebra", "ant") for n in range(2)}
    source = Folder(container(files), size=8)
    assert isinstance(source, DataSource)
    assert source.info.classes == ("ant", "zebra") and not source.info.captioned
    assert [(e.name, e.label) for e in map(source.__getitem__, range(4))] == [
        ("ant/0.png", 0), ("ant/1.png", 0), ("zebra/0.png", 1), ("zebra/1.png", 1),
    ]  # fmt: skip
    assert source[0].image.shape == (8, 8, 3)


def test_a_wrapping_folder_is_stepped_into(container: Container, picture: Picture) -> None:
    source = Folder(container({"wrap/data/ant/1.png": picture(1), "wrap/data/bee/1.png": picture(2)}))
    assert source.info.classes == ("ant", "bee") and source.rows[0].file == "wrap/data/ant/1.png"


def test_the_content_is_the_same_in_every_container(container: Container, picture: Picture, tmp_path: Path) -> None:
    files = {f"{n}.png": picture(n, (20, 14)) for n in range(3)}
    source = Folder(container(files), size=None)
    (tmp_path / "plain").mkdir()
    for name, data in files.items():
        (tmp_path / "plain" / name).write_bytes(data)
    plain = Folder(tmp_path / "plain", size=None)
    assert all(source[i].image.tobytes() == plain[i].image.tobytes() for i in range(3))
    assert source[0].image.shape == (14, 20, 3) and source.fingerprint() == plain.fingerprint()


def test_captions_from_texts(container: Container, picture: Picture) -> None:
    text = "né le 🍎 in 日本"
    source = Folder(container({"a.png": picture(0), "a.txt": f"\ufeff{text}\n".encode()}))
    assert source.info.captioned and source[0].caption == text and source[0].label is None


@pytest.mark.parametrize("key", ["file", "file_name"])
def test_captions_from_a_table(container: Container, picture: Picture, key: str) -> None:
    table = lines({key: "b/x.png", "text": "ein Käfer", "label": 1}, {key: "y.png", "text": "🐝", "label": 10})
    source = Folder(container({"metadata.jsonl": table, "b/x.png": picture(0), "y.png": picture(1)}))
    assert [source[i].caption for i in range(2)] == ["ein Käfer", "🐝"]
    assert source.info.classes == ("1", "10")


def test_a_csv_table_and_its_splits(container: Container, picture: Picture) -> None:
    table = b'file_name,caption,split\na.png,"red, round",train\nb.png,blue,test\n'
    path = container({"metadata.csv": table, "a.png": picture(0), "b.png": picture(1)})
    assert Folder(path, split="train")[0].caption == "red, round"
    assert len(Folder(path)) == 2
    with pytest.raises(UnknownName, match="did you mean 'train'"):
        Folder(path, split="trian")


def test_split_folders(container: Container, picture: Picture) -> None:
    path = container({f"{split}/ant/{n}.png": picture(n) for split, k in (("train", 3), ("test", 1)) for n in range(k)})
    assert len(Folder(path, split="train")) == 3 and Folder(path, split="test").info.classes == ("ant",)
    with pytest.raises(UserError, match="split='test'"):
        Folder(path)
    with pytest.raises(UnknownName, match="split 'tst'"):
        Folder(path, split="tst")


def test_unlabelled_and_grey(container: Container, picture: Picture) -> None:
    source = Folder(container({"a.png": picture(0), "notes.md": b"x"}), channels=1, size=4)
    assert len(source) == 1 and source[0].image.shape == (4, 4, 1) and source[0].label is source[0].caption is None


def test_names_in_another_normal_form_are_found(tmp_path: Path, picture: Picture) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(decomposed, picture(0))
        archive.writestr("captions.jsonl", lines({"file": composed, "caption": "coffee"}))
    assert Folder(tmp_path / "x.zip")[0].caption == "coffee"


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "a/../../evil.png", "..\\evil.png", "C:\\evil.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_that_lead_outside_are_refused(tmp_path: Path, picture: Picture, name: str, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, picture(0))
    else:
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo(name)
            member.size = len(picture(0))
            tar.addfile(member, io.BytesIO(picture(0)))
    with pytest.raises(UserError, match="leads outside"):
        Folder(path)


def test_links_in_a_tar_are_not_followed(tmp_path: Path, picture: Picture) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("secret.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    with pytest.raises(UserError, match="holds no image"):
        Folder(tmp_path / "x.tar")


def test_a_table_cannot_name_files_outside(tmp_path: Path, picture: Picture) -> None:
    (tmp_path / "secret.png").write_bytes(picture(0))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/captions.jsonl").write_bytes(lines({"file": "../secret.png", "caption": "x"}))
    with pytest.raises(UserError, match=r"line 1 of captions.jsonl names '../secret.png', which is not in"):
        Folder(tmp_path / "set")


def test_a_loop_of_links_ends(classes_folder: Path) -> None:
    (classes_folder / "ant/again").symlink_to(classes_folder, target_is_directory=True)
    assert len(Folder(classes_folder)) == 7


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no image"),
        ({"readme.md": b"x"}, "holds no image"),
        ({"a/x.png": b"", "y.png": b""}, r"y.png lies outside the class folders"),
        ({"x.png": b"", "x.txt": b"a", "y.png": b""}, r"1 of 2 images have no caption, the first is y.png"),
        ({"x.png": b"", "x.txt": b"\xff\xfe\xfd"}, "not readable UTF-8"),
        ({"x.png": b"", "captions.jsonl": b"{oops"}, "line 1 of captions.jsonl is not JSON"),
        ({"x.png": b"", "captions.jsonl": b"\n[1]"}, "line 2 of captions.jsonl is not a JSON object"),
        ({"x.png": b"", "captions.jsonl": b'{"caption": "x"}'}, "names no file"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    (tmp_path / "set").mkdir()
    for name, data in files.items():
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        Folder(tmp_path / "set")


def test_wrong_classes(classes_folder: Path) -> None:
    assert Folder(classes_folder, classes=("bee", "ant"))[0].label == 1
    with pytest.raises(UnknownName, match="class 'bee'"):
        Folder(classes_folder, classes=("ant", "beetle"))
    with pytest.raises(UserError, match="no image is of class wasp"):
        Folder(classes_folder, classes=("ant", "bee", "wasp"))
    with pytest.raises(UnknownName, match="did you mean 'classes'"):
        Folder(classes_folder, labels="class")


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tar.xz"])
def test_a_file_that_is_no_archive(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b not an archive" * 60)
    with pytest.raises(UserError, match=name):
        Folder(tmp_path / name)


def test_a_missing_or_strange_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Folder(tmp_path / "nothing.zip")
    (tmp_path / "x.rar").write_bytes(b"")
    with pytest.raises(UserError, match="neither a folder nor"):
        Folder(tmp_path / "x.rar")


def test_a_truncated_compressed_tar(tmp_path: Path, picture: Picture, own_cache: Path) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = len(picture(0))
        tar.addfile(member, io.BytesIO(picture(0)))
    whole = (tmp_path / "x.tar.gz").read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(whole[:-30])
    with pytest.raises(UserError, match="cannot be decompressed"):
        Folder(tmp_path / "x.tar.gz")
    assert list((own_cache / "tar").iterdir()) == []


def test_a_damaged_zip_member_is_named(tmp_path: Path, picture: Picture) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", picture(0))
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[120] ^= 1
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(CorruptImage, match="a.png .*CRC"):
        Folder(tmp_path / "x.zip")[0]


def test_an_encrypted_zip_is_refused(tmp_path: Path, picture: Picture) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", picture(0))
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(UserError, match="encrypted"):
        Folder(tmp_path / "x.zip")


def test_fingerprint_follows_the_content(classes_folder: Path) -> None:
    before = Folder(classes_folder).fingerprint()
    os.utime(classes_folder / "ant/0.png", (1, 1))
    assert Folder(classes_folder).fingerprint() == before
    assert Folder(classes_folder, size=32).fingerprint() != before
    data = bytearray((classes_folder / "ant/0.png").read_bytes())
    data[-20] ^= 1
    (classes_folder / "ant/0.png").write_bytes(data)
    changed = Folder(classes_folder).fingerprint()
    (classes_folder / "ant/0.png").rename(classes_folder / "ant/9.png")
    assert len({before, changed, Folder(classes_folder).fingerprint()}) == 3


def test_a_big_set_is_sampled(classes_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = open_files(classes_folder)
    monkeypatch.setattr("ditloom.data.archive.HASHED_WHOLE", 0)
    monkeypatch.setattr("ditloom.data.archive.HASHED_SAMPLE", 2)
    read: list[str] = []
    content = files.read
    monkeypatch.setattr(files, "read", lambda name: read.append(name) or content(name))
    first = files.fingerprint()
    assert read == ["ant/0.png", "bee/0.png", "bee/3.png"]
    (classes_folder / "bee/1.png").write_bytes(b"other size")
    assert open_files(classes_folder).fingerprint() != first


def test_a_source_can_be_sent_to_another_process(container: Container, picture: Picture) -> None:
    source = Folder(container({"a.png": picture(0)}))
    again = pickle.loads(pickle.dumps(source))
    assert again[0].image.tobytes() == source[0].image.tobytes()
