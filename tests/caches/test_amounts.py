"""Counts and shares as people write them."""

from __future__ import annotations

import pytest

from ditloom.caches.amounts import at_least, check_amount, check_share, count_of
from ditloom.contracts.errors import UserError


def test_an_integer_counts_and_a_number_with_a_point_is_a_share() -> None:
    assert [count_of(a, 28) for a in (1, 1.0, 0.75, 0, 0.0, 21)] == [1, 28, 21, 0, 0, 21]
    assert count_of(0.5, 5) == 3 and count_of(0.6, 30) == 18


@pytest.mark.parametrize("amount", [-1, -0.5, 1.5, "half", True])
def test_amounts_that_make_no_sense(amount: object) -> None:
    with pytest.raises(UserError, match="^blocks is a"):
        check_amount("blocks", amount)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1.5, "two", True])
def test_counts_that_make_no_sense(count: object) -> None:
    with pytest.raises(UserError, match="^interval is a whole number of at least 1; got"):
        at_least(1, interval=count)  # type: ignore[arg-type]


def test_shares() -> None:
    check_share(start=0, end=1.0)
    with pytest.raises(UserError, match=r"^start is a share in 0..1; got 1.5$"):
        check_share(start=1.5)
