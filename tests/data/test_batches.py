"""The loader: the same data for any workers, ranks, batch size and starting point; bad images by policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ditloom.contracts.errors import UserError
from ditloom.data.augment import Augment
from ditloom.data.batches import Batch, Batches, to_signed
from ditloom.data.emoji import Emoji
from ditloom.data.folder import Folder

STIR = Augment(flip=0.5, shift=0.2, scale=0.2)


def merged(batches: list[Batch]) -> dict[str, object]:
    keys = ("image", "label", "example", "index")
    tensors: dict[str, object] = {key: torch.cat([b[key] for b in batches]) for key in keys}  # type: ignore[literal-required]
    return tensors | {"name": [n for b in batches for n in b["name"]]}


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)  # type: ignore[arg-type]


@pytest.fixture
def source(classes_folder: Path) -> Folder:
    return Folder(classes_folder, size=8)


@pytest.fixture
def reference(source: Folder) -> dict[str, object]:
    return merged(list(Batches(source, batch_size=24, seed=5, augment=STIR, workers=0).from_image(0, 24)))


def test_shapes_and_fields(source: Folder) -> None:
    batch = Batches(source, batch_size=4, workers=0).at(0)
    assert batch["image"].shape == (4, 3, 8, 8) and batch["image"].dtype == torch.uint8
    assert batch["index"].tolist() == [0, 1, 2, 3] and batch["caption"] == [None] * 4
    for example, label, name in zip(batch["example"].tolist(), batch["label"].tolist(), batch["name"], strict=True):
        assert (source[example].label, source[example].name) == (label, name)
    assert torch.equal(batch["image"][0].permute(1, 2, 0), torch.from_numpy(source[int(batch["example"][0])].image))


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("batch_size", [3, 8, 24])
def test_workers_and_batch_size_change_nothing(
    source: Folder, reference: dict[str, object], workers: int, batch_size: int
) -> None:
    loader = Batches(source, batch_size=batch_size, seed=5, augment=STIR, workers=workers, prefetch=2, keep=2000)
    assert same(merged(list(loader.from_image(0, 24))), reference)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_global_batch(source: Folder, reference: dict[str, object], world_size: int) -> None:
    ranks = [
        Batches(source, batch_size=6, seed=5, augment=STIR, rank=rank, world_size=world_size, workers=1)
        for rank in range(world_size)
    ]
    shares = zip(*(rank.from_image(0, 24) for rank in ranks), strict=True)
    assert same(merged([share for batch in shares for share in batch]), reference)


@pytest.mark.parametrize("start", [1, 7, 13])
def test_resume_in_mid_epoch_continues(source: Folder, reference: dict[str, object], start: int) -> None:
    rest = merged(list(Batches(source, batch_size=5, seed=5, augment=STIR).from_image(start, 24)))
    assert same(rest, {key: value[start:] for key, value in reference.items()})  # type: ignore[index]


def test_without_stop_it_goes_on(source: Folder) -> None:
    stream = Batches(source, batch_size=4, workers=2).from_image()
    seen = [next(stream)["index"][0].item() for _ in range(6)]
    stream.close()
    assert seen == [0, 4, 8, 12, 16, 20]


def test_the_seed_changes_order_and_augmentation(source: Folder, reference: dict[str, object]) -> None:
    other = merged(list(Batches(source, batch_size=24, seed=6, augment=STIR, workers=0).from_image(0, 24)))
    assert other["name"] != reference["name"]


def test_an_example_is_augmented_anew_each_epoch(source: Folder) -> None:
    loader = Batches(source, batch_size=7, shuffle=False, augment=STIR, workers=0)
    assert not torch.equal(loader.at(0)["image"], loader.at(7)["image"])


def test_kept_pictures_stay_within_bounds(source: Folder) -> None:
    loader = Batches(source, batch_size=7, workers=0, keep=3 * 8 * 8 * 3)
    list(loader.from_image(0, 14))
    assert len(loader._kept) == 3


@pytest.fixture
def damaged(classes_folder: Path) -> Path:
    whole = (classes_folder / "ant/1.png").read_bytes()
    (classes_folder / "ant/1.png").write_bytes(whole[:90])
    (classes_folder / "bee/3.png").write_bytes(b"")
    return classes_folder


def test_a_corrupt_image_is_refused_by_name(damaged: Path) -> None:
    with pytest.raises(UserError, match=r"(ant/1|bee/3)\.png .*on_error='skip'"):
        list(Batches(Folder(damaged, size=8), batch_size=7, workers=2).from_image(0, 7))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_skipped_for_the_next_good_one(damaged: Path, workers: int) -> None:
    loader = Batches(Folder(damaged, size=8), batch_size=7, shuffle=False, workers=workers, on_error="skip")
    batches = list(loader.from_image(0, 14))
    assert batches[0]["example"].tolist() == [0, 2, 2, 3, 4, 5, 0]
    assert [s.name for s in batches[1]["skipped"]] == ["ant/1.png", "bee/3.png"]
    assert sorted(loader.skipped) == ["ant/1.png", "bee/3.png"]


def test_a_file_that_vanishes_is_skipped(classes_folder: Path) -> None:
    source = Folder(classes_folder, size=8)
    (classes_folder / "ant/0.png").unlink()
    batch = Batches(source, batch_size=7, shuffle=False, workers=0, on_error="skip").at(0)
    assert batch["skipped"][0].name == "ant/0.png" and batch["example"][0] == 1


def test_nothing_readable_ends_in_an_error(classes_folder: Path) -> None:
    for file in classes_folder.glob("*/*.png"):
        file.write_bytes(b"x")
    with pytest.raises(UserError, match="7 examples in a row"):
        Batches(Folder(classes_folder, size=8), batch_size=2, workers=0, on_error="skip").at(0)


def test_captions_and_wordings() -> None:
    source = Emoji()
    plain = Batches(source, batch_size=16, workers=0).at(0)
    assert plain["caption"] == [source[int(i)].caption for i in plain["example"]]
    worded = Batches(source, batch_size=16, workers=0, wordings=True)
    drawn = worded.at(0)["caption"]
    assert all(text in source.texts(int(i)) for text, i in zip(drawn, plain["example"], strict=True))
    assert drawn == worded.at(0)["caption"] != plain["caption"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 5, "world_size": 2}, "split over 2 processes"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2, "on_error": "ignore"}, "'refuse' or 'skip'"),
        ({"batch_size": 2, "wordings": True}, "one caption"),
    ],
)
def test_impossible_settings_are_refused(source: Folder, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Batches(source, **settings)  # type: ignore[arg-type]


def test_images_of_many_sizes_need_a_size(classes_folder: Path) -> None:
    source = Folder(classes_folder, size=None)
    with pytest.raises(UserError, match="size=64"):
        Batches(source, batch_size=2)
    assert Batches(source, batch_size=2, size=6, workers=0).at(0)["image"].shape == (2, 3, 6, 6)


def test_a_source_that_breaks_its_promise_is_named(source: Folder) -> None:
    source.info = replace(source.info, size=(9, 9))
    with pytest.raises(UserError, match="promises"):
        Batches(source, batch_size=2, workers=0).at(0)


def test_to_signed_spans_minus_one_to_one() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8)
    assert to_signed(pixels).tolist() == [-1.0, 1.0]
    assert np.isclose(to_signed(torch.tensor([128], dtype=torch.uint8)).item(), 0.0039, atol=1e-4)
