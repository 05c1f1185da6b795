"""CIFAR-10 from image folders and from the published binary files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.data.cifar10 import CLASSES, Cifar10


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def photos(path: Path, picture: Callable[..., bytes], classes: tuple[str, ...] = CLASSES) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for split in ("test", "train"):
            for number, name in enumerate(classes):
                add(tar, f"{split}/{name}/0000.png", picture(number, (32, 32)))
    return path


def test_image_folders_in_a_compressed_tar(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    source = Cifar10(photos(tmp_path / "cifar10.tar.xz", picture))
    assert len(source) == 10 and source.info.classes == CLASSES
    assert [source[i].label for i in range(10)] == list(range(10)) and source[0].image.shape == (32, 32, 3)
    assert source.fingerprint() != Cifar10(tmp_path / "cifar10.tar.xz", "test").fingerprint()


def test_binary_files(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    records = b"".join(bytes([n]) + image.tobytes() for n, image in enumerate(pixels))
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        add(tar, "cifar-10-batches-bin/data_batch_1.bin", records[: 2 * 3073])
        add(tar, "cifar-10-batches-bin/data_batch_2.bin", records[2 * 3073 :])
        add(tar, "cifar-10-batches-bin/test_batch.bin", records[:3073])
    source = Cifar10(tmp_path / "c.tar.gz")
    assert len(source) == 4 and len(Cifar10(tmp_path / "c.tar.gz", "test")) == 1
    assert source[3].label == 3 and source[3].group == "cat"
    assert np.array_equal(source[3].image, pixels[3].transpose(1, 2, 0))


def test_what_is_not_cifar10_is_refused(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    with pytest.raises(UnknownName, match="did you mean 'cat'"):
        Cifar10(photos(tmp_path / "x.tar.xz", picture, (*CLASSES[:3], "cats", *CLASSES[4:])))
    with pytest.raises(UserError, match="no image is of class truck"):
        Cifar10(photos(tmp_path / "y.tar.xz", picture, CLASSES[:9]))
    with pytest.raises(UnknownName, match="'train'"):
        Cifar10(tmp_path / "x.tar.xz", "training")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/data_batch_1.bin").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="multiple of 3073"):
        Cifar10(tmp_path / "bin")
