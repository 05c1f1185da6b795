"""Retrieval: identities, a brute-force rank, chance, and the group of the nearest."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from painter import real
from scipy.stats import rankdata

from ditloom.contracts.errors import UserError
from ditloom.measure.evidence import Evidence
from ditloom.measure.extractors.pixels import Pixels
from ditloom.measure.retrieval import Retrieval, places, ranks, similarity


def readings(drawn, cases, training, held_out):
    found = Retrieval()(Evidence(drawn, cases, training, held_out, Pixels(8)))
    return {reading.name.removeprefix("retrieval/"): reading for reading in found}


def test_real_pictures_retrieve_themselves():
    training, held_out = real(range(3)), real(range(3, 4))
    found = readings(held_out.images, held_out.cases, training, held_out)
    assert found["median-rank"].value == found["mean-rank"].value == 1
    assert found["top-1"].value == found["right-group"].value == 1
    assert found["median-rank"].facts == {"gallery": 40, "chance": 20.5}
    assert found["right-group"].facts["chance"] == pytest.approx(0.5)


def test_pictures_of_other_captions_have_the_wrong_rank_and_group():
    training, held_out = real(range(1)), real(range(1, 2))
    found = readings(np.roll(held_out.images, 1, axis=0), held_out.cases, training, held_out)
    assert found["mean-rank"].value > 2
    assert found["top-1"].value == found["right-group"].value == 0


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=6), st.data())
@settings(deadline=None, max_examples=40)
def test_ranks_are_those_of_scipy_with_ties_shared(rows, data):
    table = torch.tensor(rows, dtype=torch.float64)
    own = torch.tensor([data.draw(st.integers(0, 4)) for _ in rows])
    expected = [rankdata([-v for v in row])[place] for row, place in zip(rows, own.tolist(), strict=True)]
    assert ranks(table, own).tolist() == expected


def test_similarity_is_the_cosine_whatever_the_length():
    a, b = torch.randn(4, 9), torch.randn(6, 9)
    expected = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    assert torch.allclose(similarity(3 * a, b / 7).float(), expected, atol=1e-6)


def test_a_case_without_a_real_picture_is_named():
    training = real(range(1))
    with pytest.raises(UserError, match="'0-5'"):
        places(real(range(5, 6)).cases, training.cases)
