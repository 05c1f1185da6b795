"""Random numbers follow from what they are for, and from nothing else."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditloom.contracts import rng

SMALL = st.integers(0, 2**40)


@given(seed=SMALL, index=SMALL, step=st.integers(0, 1000), evaluation=st.integers(0, 3))
def test_any_image_alone_is_the_image_in_its_batch(seed: int, index: int, step: int, evaluation: int) -> None:
    batch = rng.normal((3, 2), seed, "noise", [index + 5, index, 1], step, evaluation)
    alone = rng.normal((3, 2), seed, "noise", [index], step, evaluation)
    assert torch.equal(batch[1:2], alone)


@given(st.lists(st.tuples(SMALL, st.sampled_from(["noise", "sampler", "a/b"]), SMALL), min_size=2, unique=True))
def test_other_arguments_are_other_streams(arguments: list[tuple[int, str, int]]) -> None:
    assert len({rng.digest(*a) for a in arguments}) == len(arguments)


def test_fields_do_not_run_into_each_other() -> None:
    assert rng.digest(1, "a", 12, 3) != rng.digest(1, "a", 1, 23)
    assert rng.digest(1, "noise", 0, 1, 0) != rng.digest(1, "noise", 0, 0, 1)


def test_pinned_values_and_equal_in_another_process() -> None:
    code = "from ditloom.contracts import rng; print(rng.key(3, 'noise', 7, 1))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ran.stdout) == rng.key(3, "noise", 7, 1)
    assert rng.digest(0, "noise").hex() == "9cb085f6483765907bcf5e59dd4d080b"


def test_drawing_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(1)
    before: Any = torch.get_rng_state().clone(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    rng.normal((4,), 0, "x", range(3))
    rng.stream(0, "x").initial_seed()
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # type: ignore[index]


@pytest.mark.parametrize("draw, mean, variance", [(rng.normal, 0.0, 1.0), (rng.uniform, 0.5, 1 / 12)])
def test_distribution(draw: Any, mean: float, variance: float) -> None:
    x = draw((1000,), 5, "d", range(40)).double()
    assert float(x.mean()) == pytest.approx(mean, abs=5 * (variance / x.numel()) ** 0.5)
    assert float(x.var()) == pytest.approx(variance, rel=0.03)
    across = torch.corrcoef(x)
    assert float((across - torch.eye(40)).abs().max()) < 5 / 1000**0.5


def test_integers_cover_their_range() -> None:
    x = rng.integers(7, (500,), 0, "i", [0, 1])
    assert x.dtype is torch.int64 and set(x.flatten().tolist()) == set(range(7))
    assert rng.normal((2, 3), 0, "n", []).shape == (0, 2, 3)
