"""Numbers written as a count or as a share: an integer counts, a number with a point is a share of the whole."""

from __future__ import annotations

from ditloom.contracts.errors import UserError

Amount = int | float
"""3 is three of them; 0.75 is three quarters; 1 is one, 1.0 is all."""


def count_of(amount: Amount, total: int) -> int:
    """How many of `total` an amount is; a share is rounded to the nearest whole number (halves up)."""
    return amount if isinstance(amount, int) else int(amount * total + 0.5)


def check_amount(name: str, amount: Amount) -> None:
    """Refuse a negative count, and a share outside 0..1."""
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise UserError(f"{name} is a whole number or a share such as 0.5; got {amount!r}")
    if amount < 0 or (isinstance(amount, float) and amount > 1):
        raise UserError(f"{name} is a count of at least 0 or a share in 0.0..1.0; got {amount!r}")


def at_least(least: int, **counts: int) -> None:
    """Refuse a count that is not a whole number of at least `least`."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name} is a whole number of at least {least}; got {value!r}")


def check_share(**shares: float) -> None:
    """Refuse a share outside 0..1."""
    for name, value in shares.items():
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(f"{name} is a share in 0..1; got {value!r}")
