"""Hugging Face data sets: from disk, with bad cells, and without the library."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ditloom.contracts.errors import MissingExtra, UnknownName, UserError
from ditloom.data.batches import Batches
from ditloom.data.hf import HuggingFace


@pytest.fixture
def saved(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    cells = [{"bytes": picture(n, (20, 16)), "path": None} for n in range(3)] + [{"bytes": b"bad", "path": None}]
    columns = {"image": cells, "label": [0, 1, 1, 0], "text": ["a", "b", "c", "d"]}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["ant", "bee"]),
            "text": datasets.Value("string"),
        }
    )
    table = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_saved_data_set(saved: Path) -> None:
    source = HuggingFace(str(saved), size=8)
    assert len(source) == 4 and source.info.classes == ("ant", "bee") and source.info.captioned
    example = source[1]
    assert (example.label, example.group, example.caption, example.image.shape) == (1, "bee", "b", (8, 8, 3))
    assert source.fingerprint() == HuggingFace(str(saved), size=8).fingerprint()
    assert source.fingerprint() != HuggingFace(str(saved), size=4).fingerprint()


def test_a_bad_cell_follows_the_policy(saved: Path) -> None:
    source = HuggingFace(str(saved), size=8)
    batch = Batches(source, batch_size=4, shuffle=False, workers=0, on_error="skip").at(0)
    assert batch["example"].tolist() == [0, 1, 2, 0] and batch["skipped"][0].name.endswith("[train][3]")
    with pytest.raises(UserError, match=r"\[train\]\[3\] is not a readable image"):
        Batches(source, batch_size=4, workers=0).at(0)


def test_wrong_names(saved: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'train'"):
        HuggingFace(str(saved), split="trian")
    with pytest.raises(UnknownName, match="did you mean 'image'"):
        HuggingFace(str(saved), image="images")
    with pytest.raises(UserError, match="expected images"):
        HuggingFace(str(saved), image="text")


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"ditloom\[data\]"):
        HuggingFace("someone/something")
