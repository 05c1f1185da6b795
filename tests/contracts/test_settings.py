"""Settings as people write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditloom.contracts.errors import UserError
from ditloom.contracts.settings import construct, named, parse

VALUES = st.recursive(
    st.integers() | st.booleans() | st.none() | st.text(st.characters(min_codepoint=32, max_codepoint=126)),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


@given(st.dictionaries(st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True), VALUES, max_size=4))
def test_whatever_is_written_as_literals_is_read_back(settings: dict[str, Any]) -> None:
    text = ",".join(f"{key}={value!r}" for key, value in settings.items())
    assert parse(f"some-name:{text}") == ("some-name", settings)


@pytest.mark.parametrize(
    "text, settings",
    [
        ("pab", {}),
        ("pab:", {}),
        ("pab: window=(100, 850), cross = 6", {"window": (100, 850), "cross": 6}),
        ("pab:table={1: [0, 4]},cross-range=6", {"table": {1: [0, 4]}, "cross_range": 6}),
        ("pab:file=/tmp/a b.json,mode=fast", {"file": "/tmp/a b.json", "mode": "fast"}),
        ("pab:schedule='cosine,linear'", {"schedule": "cosine,linear"}),
    ],
)
def test_written_by_hand(text: str, settings: dict[str, Any]) -> None:
    assert parse(text) == ("pab", settings)


def test_a_setting_without_a_value_is_one_sentence() -> None:
    with pytest.raises(UserError, match="'cross' without a value"):
        parse("pab:cross")


@dataclass(frozen=True, kw_only=True)
class Wave:
    """Settings."""

    length: float = 1.0
    bands: tuple[int, ...] = ()


def test_construction() -> None:
    assert construct("wave", Wave, {"bands": [1, 2]}) == Wave(bands=(1, 2))
    assert named("wave", {"sine": Wave}, {"name": "sine", "length": 2.0}) == Wave(length=2.0)
    ready = Wave()
    assert named("wave", {}, ready) is ready
    for wrong, message in (({"lenght": 1}, "'length'"), ({}, "")):
        if wrong:
            with pytest.raises(UserError, match=message):
                construct("wave", Wave, wrong)
    with pytest.raises(UserError, match="did you mean 'sine'"):
        named("wave", {"sine": Wave}, "sinus")
    with pytest.raises(UserError, match="mapping with a 'name'"):
        named("wave", {"sine": Wave}, {"length": 2.0})
