"""FoCa and dynamic modes: step by step cache-dit's own calibrators, where the definitions agree; and their limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.caches.dmd import DynamicModes, evenly_spaced
from ditloom.caches.foca import FoCa, foca_weights
from ditloom.caches.predictors import predictor
from ditloom.contracts.errors import UserError
from tests.caches.acting import counted, drawn
from tests.sites import toys

STEPS = 24
PATTERNS = {
    "every second": (*range(5), *range(6, STEPS, 2)),
    "every third": (*range(6), *range(8, STEPS, 3)),
    "every fifth": tuple(range(0, STEPS, 5)),
    "irregular": (0, 1, 2, 5, 6, 9, 10, 11, 15, 16, 21),
}
# vipshop/cache-dit 1.5.3, FoCaState and DMDState: the first value of what they forecast of `smooth`, by step.
FOCA = {
    "every second": {5: 1.1036392, 7: 0.8829581, 15: -0.0876564, 23: -0.3839367},
    "every third": {6: 1.0243836, 7: 0.9753631, 15: -0.0443835, 22: -0.456849},
}
DMD = {
    "every second": {5: 1.073404, 15: -0.0409714, 23: -0.3745499},
    "every third": {6: 0.997995, 7: 0.9010002, 19: -0.2921071, 22: -0.3648599},
}


def smooth(step: int) -> Tensor:
    """Two damped oscillations, of different phase at every place: [2, 6]."""
    place = torch.arange(12, dtype=torch.float64).reshape(2, 6)
    first = torch.exp(torch.tensor(-0.03 * step)) * torch.cos(0.1 * step + place)
    return first + 0.5 * torch.exp(torch.tensor(-0.08 * step)) * torch.sin(0.25 * step + 2 * place)


def forecasts(rule: Any, computed: Sequence[int], feature: Callable[[int], Tensor] = smooth) -> dict[int, Tensor]:
    """What a predictor says on every step that is not computed."""
    kept: list[tuple[int, Tensor]] = []
    found = {}
    for step in range(STEPS):
        if step in computed:
            kept = [*kept, (step, feature(step))][-rule.depth :]
        else:
            found[step] = rule(kept, step)
    return found


@pytest.mark.parametrize("name", FOCA)
def test_golden_steps(name: str) -> None:
    for rule, golden in ((FoCa(16), FOCA), (DynamicModes(), DMD)):
        found = forecasts(rule, PATTERNS[name])
        assert {s: float(found[s][0, 0]) for s in golden[name]} == pytest.approx(golden[name], abs=1e-5)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("state, rule", [("foca.FoCaState", FoCa(16)), ("dmd.DMDState", DynamicModes())])
def test_beside_cache_dit(name: str, state: str, rule: Any) -> None:
    """Where its package is installed. Below four evenly spaced values its dmd divides the change over two values by the
    distance of one; ours is the line through the last two, which is its own description.
    """
    package = pytest.importorskip("cache_dit.caching.cache_contexts.calibrators")
    module, _, kind = state.partition(".")
    theirs = getattr(getattr(package, module), kind)()
    found, kept = forecasts(rule, PATTERNS[name]), list[tuple[int, Tensor]]()
    for step in range(STEPS):
        theirs.mark_step_begin()
        if step in PATTERNS[name]:
            theirs.update(smooth(step))
            kept = [*kept, (step, smooth(step))][-rule.depth :]
        else:
            expected = theirs.approximate()
            if module == "foca" or len(evenly_spaced(kept)) >= 4:
                torch.testing.assert_close(found[step], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["every third", "every fifth"])
def test_modes_are_exact_on_exponentials(name: str) -> None:
    """Four real modes from six values, also between and beyond the distances."""
    computed = PATTERNS[name]
    for step, found in forecasts(DynamicModes(), computed).items():
        kept = [s for s in computed if s < step][-6:]
        if len(evenly_spaced([(s, None) for s in kept])) == 6:
            torch.testing.assert_close(found, smooth(step), atol=1e-5, rtol=1e-5)


def test_rows_are_forecast_apart() -> None:
    history = [(s, smooth(s)) for s in range(6)]
    whole = DynamicModes()(history, 8)
    torch.testing.assert_close(DynamicModes()([(s, z[1:]) for s, z in history], 8), whole[1:], atol=1e-9, rtol=1e-9)


def test_what_cannot_be_fitted() -> None:
    """A constant stays, nothing stays nothing, something infinite gives the newest; two values give a line."""
    constant = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(DynamicModes()([(s, constant) for s in range(5)], 9), constant, atol=1e-6, rtol=1e-6)
    zero = torch.zeros(2, 5)
    assert torch.equal(DynamicModes()([(s, zero) for s in range(5)], 9), zero)
    odd = [(s, torch.full((1, 2), torch.inf) if s == 1 else torch.ones(1, 2)) for s in range(5)]
    assert torch.equal(DynamicModes()(odd, 6), torch.ones(1, 2))
    line = DynamicModes()([(2, torch.ones(1, 2)), (4, torch.full((1, 2), 3.0))], 7)
    assert torch.equal(line, torch.full((1, 2), 6.0))
    assert torch.equal(DynamicModes()([(4, constant)], 7), constant)


def test_foca_forgets_what_is_behind_two_in_a_row() -> None:
    """Then memory 4 is the whole chain; it holds one value, and predicts a constant whatever the gaps."""
    found = [forecasts(FoCa(memory), PATTERNS["irregular"]) for memory in (4, 16)]
    assert all(torch.allclose(found[0][s], found[1][s]) for s in found[0])
    assert foca_weights((3,), 7) == (1.0,)
    assert foca_weights((3, 4), 5) == pytest.approx((-1.0, 2.0)), "of two in a row the next is on their line"
    assert sum(foca_weights((0, 3, 5, 9), 13)) == pytest.approx(1)


@pytest.mark.parametrize("spec", ["foca", "dmd:history=4"])
@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_in_a_run(spec: str, name: str) -> None:
    """Forecasts cost no matrix product of the network, differ from holding, and are the same with branches apart."""
    method = "dbcache:first=1,warmup=5,threshold=1.0,max_consecutive=2,predictor={}"
    with counted() as macs:
        whole, run = drawn(toys.make(name), method.format(spec), steps=9)
    assert run.report.macs <= macs[0] <= 1.05 * run.report.macs
    apart, _ = drawn(toys.make(name), method.format(spec), steps=9, batched=False)
    held, _ = drawn(toys.make(name), method.format("hold"), steps=9)
    torch.testing.assert_close(whole, apart, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole, held, atol=1e-5)


def test_bad_input() -> None:
    for spec, sentence in (
        ("foca:memory=1", "^foca keeps 2 to 16 computed values; got memory=1$"),
        ("dmd:history=3", "^dmd keeps 4 to 16 values and takes a rank of at least 0; got history=3,rank=0$"),
        ("fooca", "^unknown predictor 'fooca': did you mean 'foca'"),
    ):
        with pytest.raises(UserError, match=sentence):
            predictor(spec)
