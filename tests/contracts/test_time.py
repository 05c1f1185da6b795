"""Noise levels and the network's own time: exact where it matters."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ditloom.contracts.clock import Clock, Window
from ditloom.contracts.errors import UserError
from ditloom.contracts.time import DISCRETE_1000, FLOW, FLOW_1000, REVERSED, TimeInput

KINDS = st.builds(
    TimeInput, scale=st.sampled_from([1.0, 1000.0, 0.5]), offset=st.sampled_from([0.0, -1.0]), reversed=st.booleans()
)


@given(KINDS, st.floats(0, 1))
def test_there_and_back(kind: TimeInput, t: float) -> None:
    level = torch.tensor([t], dtype=torch.float64)
    torch.testing.assert_close(kind.noise_level(kind.native(level)), level, atol=1e-12, rtol=0)


def test_every_discrete_step_is_a_whole_number() -> None:
    levels = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert DISCRETE_1000.native(levels).tolist() == list(range(1000))
    missed = ((levels.float() * 1000) != torch.arange(1, 1001)).sum()
    assert int(missed) > 0, "in float32 some of them are not: this is why conversions are in float64"


def test_the_kinds_of_the_field() -> None:
    t = torch.tensor([0.25])
    assert [float(k.native(t)) for k in (FLOW, FLOW_1000, REVERSED)] == [0.25, 250.0, 0.75]


@given(st.integers(1, 200), st.floats(0, 1), st.floats(0, 1))
def test_windows_by_fraction_split_a_run_without_gap_or_overlap(steps: int, a: float, b: float) -> None:
    low, high = sorted((a, b))
    parts = [Window(0.0, low), Window(low, high), Window(high, 1.0)]
    for step in range(steps):
        assert sum(w.contains(Clock(step, steps)) for w in parts) == 1


def test_windows_by_noise_and_index() -> None:
    window = Window(0.8, 0.2, "noise")
    assert [window.contains(Clock(0, 9, t=t)) for t in (0.9, 0.8, 0.5, 0.2)] == [False, True, True, False]
    assert [Window(1, 3, "index").contains(Clock(s, 9)) for s in range(4)] == [False, True, True, False]
    for wrong in ((0.2, 0.8, "noise"), (0.8, 0.2, "fraction")):
        try:
            Window(*wrong)  # type: ignore[arg-type]
        except UserError as error:
            assert "is empty" in str(error)
        else:
            raise AssertionError(wrong)
