"""Fashion-MNIST: idx files, the Debian package, and the published facts of the real data."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.data import fashion_mnist
from ditloom.data.fashion_mnist import SYSTEM, FashionMnist, unpack_deb


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def tiny_files(count: int = 6) -> dict[str, bytes]:
    random = np.random.default_rng(0)
    files = {}
    for split in ("train", "t10k"):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        files[f"{split}-images-idx3-ubyte.gz"] = gzip.compress(idx(images))
        files[f"{split}-labels-idx1-ubyte.gz"] = gzip.compress(idx(np.arange(count, dtype=np.uint8)))
    return files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "fm").mkdir()
    for name, data in tiny_files().items():
        (tmp_path / "fm" / name).write_bytes(data)
    return tmp_path / "fm"


def test_a_local_copy(folder: Path) -> None:
    source = FashionMnist(folder)
    assert len(source) == 6 and source[3].label == 3 and source[3].group == "dress"
    assert source[0].image.shape == (28, 28, 1) and source.info.channels == 1
    assert not np.array_equal(source.images, FashionMnist(folder, "test").images)


def test_plain_files_too(folder: Path) -> None:
    packed = FashionMnist(folder)
    for file in list(folder.iterdir()):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    assert FashionMnist(folder).fingerprint() == packed.fingerprint()


def test_the_frame_is_black_and_even(folder: Path) -> None:
    image = FashionMnist(folder, size=32)[0].image[:, :, 0]
    assert np.array_equal(image[2:30, 2:30], FashionMnist(folder)[0].image[:, :, 0])
    assert image.shape == (32, 32) and image.sum() == image[2:30, 2:30].sum(dtype=int)


def test_wrong_settings_and_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="'train'"):
        FashionMnist(folder, "trane")
    with pytest.raises(UserError, match="28 or more"):
        FashionMnist(folder, size=16)
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        FashionMnist(tmp_path / "nothing")
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"broken")
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz is not an idx file"):
        FashionMnist(folder)


def test_images_and_labels_must_fit(folder: Path) -> None:
    labels = gzip.compress(idx(np.zeros(5, dtype=np.uint8)))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(labels)
    with pytest.raises(UserError, match=r"images \(6, 28, 28\) and labels \(5,\)"):
        FashionMnist(folder)


def debian_package(path: Path) -> Path:
    """An `ar` archive with a tar inside, as `dpkg-deb` writes it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, content in tiny_files().items():
            member = tarfile.TarInfo(f"./usr/share/datasets/fashion-mnist/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    archive = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())):
        archive += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        archive += b"\n" * (len(content) % 2)
    path.write_bytes(archive)
    return path


def test_the_package_is_fetched_and_unpacked(
    tmp_path: Path, folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deb = debian_package(tmp_path / "made.deb")
    monkeypatch.setattr(fashion_mnist, "SYSTEM", tmp_path / "not installed")
    monkeypatch.setattr(fashion_mnist, "FETCH", ["cp", str(deb), "."])
    source = FashionMnist()
    assert source.fingerprint() == FashionMnist(folder).fingerprint()
    assert len(list((own_cache / "fashion-mnist").iterdir())) == 4
    monkeypatch.setattr(fashion_mnist, "FETCH", ["false"])
    assert FashionMnist().fingerprint() == source.fingerprint()


def test_when_nothing_works_the_command_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "SYSTEM", tmp_path / "not installed")
    monkeypatch.setattr(fashion_mnist, "FETCH", ["no-such-program"])
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        FashionMnist()


@pytest.mark.parametrize("content", [b"", b"!<arch>\n", b"!<arch>\n" + b"x" * 200])
def test_a_broken_package(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.deb").write_bytes(content)
    with pytest.raises(UserError, match="not a readable Debian package"):
        unpack_deb(tmp_path / "x.deb", tmp_path / "out")


@pytest.mark.skipif(not SYSTEM.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_the_real_data_has_the_published_statistics() -> None:
    """6,000 and 1,000 a class; mean 0.2860 and deviation 0.3530 of the training pixels, as widely published."""
    train, test = FashionMnist(), FashionMnist(split="test")
    assert np.bincount(train.labels).tolist() == [6000] * 10 and np.bincount(test.labels).tolist() == [1000] * 10
    assert abs(train.images.mean() / 255 - 0.2860) < 1e-4 and abs(train.images.std() / 255 - 0.3530) < 1e-4
    assert train.labels[:5].tolist() == [9, 0, 0, 3, 0]
