"""Class labels and the empty condition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditloom.conditions.labels import Labels
from ditloom.conditions.none import Unconditional
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.registries import CONDITIONERS

NAMES = ("T-shirt/top", "Trouser", "Ankle boot")


def test_indices_names_and_null_share_one_table():
    labels = Labels(names=NAMES)
    rows = labels.encode([0, "trouser", "Ankle boot", " ankle boot ", "2", None, ""]).label
    assert rows.tolist() == [0, 1, 2, 2, 2, 3, 3]
    assert labels.null(2).label.tolist() == [3, 3]


@given(st.integers(1, 50), st.data())
def test_every_index_maps_to_itself(count, data):
    index = data.draw(st.integers(0, count - 1))
    labels = Labels(count)
    assert labels.index(index) == labels.index(str(index)) == index
    assert labels.index(None) == count


def test_a_name_that_is_a_number_wins_over_the_index():
    assert Labels(names=("9", "8", "7")).index("7") == 2


@pytest.mark.parametrize("bad", [-1, 3, "-1", "99"])
def test_class_out_of_range_is_named(bad):
    with pytest.raises(UserError, match="0 to 2"):
        Labels(3).encode([bad])


def test_unknown_name_offers_the_nearest():
    with pytest.raises(UnknownName, match="'Trouser'"):
        Labels(names=NAMES).encode(["trousers"])


@pytest.mark.parametrize("settings", [{}, {"num_classes": 0}, {"num_classes": 2, "names": NAMES}])
def test_contradictory_settings_are_refused(settings):
    with pytest.raises(UserError):
        Labels(**settings)


def test_unconditional_takes_nothing():
    none = Unconditional()
    assert none.encode([None, ""]) == Condition()
    assert Condition.cat([none.null(1), none.null(2)]).batch is None
    with pytest.raises(UserError, match="unconditional"):
        none.encode(["a red apple"])


@pytest.mark.parametrize("made", [Labels(3), Labels(names=NAMES), Unconditional()])
def test_rebuilt_from_its_own_config(made):
    name = type(made).__registration__.name
    again = CONDITIONERS.get(name)(**made.config())
    assert again.config() == made.config()
    assert torch.equal(again.null(2).label, made.null(2).label) if made.null(2).label is not None else True
