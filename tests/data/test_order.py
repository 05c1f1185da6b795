"""The image-count order: a permutation each epoch, the same however it is cut."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ditloom.data.order import ImageOrder

lengths = st.integers(1, 700)
seeds = st.integers(0, 2**63)
GOLDEN = [3, 8, 1, 9, 7, 0, 2, 6, 4, 5, 5, 3, 6, 8, 9, 4, 7, 1, 2, 0]


@settings(max_examples=60)
@given(lengths, seeds, st.integers(0, 2**40))
def test_each_epoch_is_a_permutation(length: int, seed: int, epoch: int) -> None:
    shown = ImageOrder(length, seed).examples(epoch * length, (epoch + 1) * length)
    assert sorted(shown) == list(range(length))


@settings(max_examples=40)
@given(lengths, seeds, st.integers(0, 3000), st.lists(st.integers(1, 97), min_size=1, max_size=6))
def test_any_cutting_gives_the_same_sequence(length: int, seed: int, start: int, cuts: list[int]) -> None:
    order = ImageOrder(length, seed)
    ends = start + np.cumsum(cuts)
    pieces = [order.examples(int(a), int(b)) for a, b in zip([start, *ends[:-1]], ends, strict=True)]
    assert np.array_equal(np.concatenate(pieces), order.examples(start, int(ends[-1])))


@settings(max_examples=40)
@given(lengths, seeds, st.lists(st.integers(0, 10**6), min_size=1, max_size=12))
def test_scattered_images_equal_the_run(length: int, seed: int, images: list[int]) -> None:
    order = ImageOrder(length, seed)
    assert [int(order.examples(i, i + 1)[0]) for i in images] == order.at(np.array(images)).tolist()


def test_unshuffled_counts_up() -> None:
    assert ImageOrder(3, shuffle=False).examples(2, 8).tolist() == [2, 0, 1, 2, 0, 1]


def test_positions_are_uniform() -> None:
    """Chi-square of (position, example) over 6,000 epochs of 10: 81 degrees of freedom, mean 81, deviation 12.7."""
    epochs, length = 6000, 10
    shown = ImageOrder(length, 7).examples(0, epochs * length).reshape(epochs, length)
    counts = np.array([np.bincount(shown[:, p], minlength=length) for p in range(length)])
    expected = epochs / length
    assert ((counts - expected) ** 2 / expected).sum() < 81 + 4 * 12.7


def test_neighbours_in_the_source_do_not_stay_neighbours() -> None:
    shown = ImageOrder(10_000, 3).examples(0, 10_000)
    assert abs(np.corrcoef(shown[:-1], shown[1:])[0, 1]) < 0.04
    assert (shown == np.arange(10_000)).sum() < 8


@settings(max_examples=20)
@given(seeds, st.integers(0, 100))
def test_seeds_and_epochs_differ(seed: int, epoch: int) -> None:
    a, b = epoch * 200, epoch * 200 + 200
    this = ImageOrder(200, seed).examples(a, b)
    assert not np.array_equal(this, ImageOrder(200, seed + 1).examples(a, b))
    assert not np.array_equal(this, ImageOrder(200, seed).examples(a + 200, b + 200))


def test_the_order_of_old_runs_is_kept() -> None:
    """These numbers were printed once; a change would make every checkpoint resume on other images."""
    assert ImageOrder(10, 0).examples(0, 20).tolist() == GOLDEN


def test_a_huge_set_costs_nothing() -> None:
    shown = ImageOrder(5_000_000_000, 1).examples(12_345_678_901, 12_345_678_901 + 64)
    assert len(set(shown.tolist())) == 64 and shown.min() >= 0 and shown.max() < 5_000_000_000
