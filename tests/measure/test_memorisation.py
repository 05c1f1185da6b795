"""Nearest-training distances against brute force, and the order of copies and of unseen pictures."""

import pytest
import torch
from painter import real
from scipy.stats import mannwhitneyu

from ditloom.contracts.errors import UserError
from ditloom.measure.evidence import Evidence
from ditloom.measure.extractors.pixels import Pixels
from ditloom.measure.memorisation import Memorisation, nearest_training, share_closer


def readings(drawn, held_out):
    found = Memorisation()(Evidence(drawn.images, drawn.cases, real(range(3)), held_out, Pixels(8)))
    return {reading.name.removeprefix("memorisation/"): reading.value for reading in found}


def test_distances_are_those_of_brute_force():
    queries, training = torch.randn(300, 7), torch.randn(50, 7)
    distances, rows = nearest_training(queries, training)
    table = torch.cdist(queries.double(), training.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.allclose(distances, table.min(1).values, rtol=1e-12)
    assert torch.equal(rows, table.argmin(1))


def test_a_copy_is_at_distance_exactly_zero():
    training = 1000 + torch.randn(20, 7)
    distances, rows = nearest_training(training[3:5], training)
    assert distances.tolist() == [0, 0]
    assert rows.tolist() == [3, 4]


def test_copies_are_closer_than_unseen_pictures_and_unseen_ones_are_not():
    copies = readings(real(range(2)), real(range(7, 9)))
    assert copies["median-distance"] == 0
    assert copies["closer"] == 1
    unseen = readings(real(range(5, 7)), real(range(7, 9)))
    assert 0.3 < unseen["closer"] < 0.7
    assert unseen["median-distance"] == pytest.approx(unseen["held-out-median-distance"], rel=0.2)


def test_the_share_is_the_mann_whitney_statistic():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randint(9, (31,), generator=draw).double(), torch.randint(12, (17,), generator=draw).double()
    assert share_closer(a, b) == pytest.approx(mannwhitneyu(b, a).statistic / (31 * 17))


def test_no_training_pictures_are_refused():
    with pytest.raises(UserError, match="no training pictures"):
        nearest_training(torch.zeros(2, 3), torch.zeros(0, 3))
