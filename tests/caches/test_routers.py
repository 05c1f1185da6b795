"""Caches that follow learned scores: what is computed, what is reused, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.caches.harmonica import HarmoniCa
from ditloom.caches.learning_to_cache import LearningToCache
from ditloom.caches.routers import SCORES, Gates, MaskedCache, computed, costs_of, threshold_of
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets
from ditloom.contracts.plan import Action
from ditloom.sites.surface import Surface
from tests.sites import toys
from tests.sites.driving import STEPS, by_run

NAMES = ("dit", "mmdit", "u-vit")


def surface_of(name: str) -> Surface:
    model = toys.make(name)
    _, run = by_run(model, [MaskedCache("all", torch.ones(STEPS, sites(name), dtype=torch.bool))])
    assert run.program is not None
    return run.program.surface


def sites(name: str) -> int:
    return sum(len(b.sites) for b in toys.make(name).blocks if not b.is_transition)


def random_scores(name: str, seed: int = 0) -> Tensor:
    return torch.rand(STEPS, sites(name), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_all_scores_high_is_the_bare_model_bit_for_bit(name: str) -> None:
    handler = HarmoniCa().bind(surface_of(name), Assets({SCORES: torch.full((STEPS, sites(name)), 0.993)}))
    plain, _ = by_run(toys.make(name), [])
    cached, run = by_run(toys.make(name), [handler])
    assert torch.equal(plain, cached)
    assert run.report.macs >= run.report.full_macs, "looking at the layout costs one embedding, nothing is saved"


@pytest.mark.parametrize("name", NAMES)
def test_all_scores_low_computes_sub_modules_on_the_first_step_alone(name: str) -> None:
    handler = HarmoniCa().bind(surface_of(name), Assets({SCORES: torch.full((STEPS, sites(name)), 0.007)}))
    _, run = by_run(toys.make(name), [handler])
    counts = run.report.counts
    branches = len(run.conditions)
    for site in run.program.surface.submodules:  # type: ignore[union-attr]
        assert counts[site.label, "compute"] == branches
        assert counts[site.label, "reuse"] == branches * (STEPS - 1)


@pytest.mark.parametrize("name", NAMES)
def test_macs_are_the_sum_of_mask_times_cost(name: str) -> None:
    surface, scores = surface_of(name), random_scores(name)
    _, run = by_run(toys.make(name), [HarmoniCa(threshold=0.5).bind(surface, Assets({SCORES: scores}))])
    mask = computed(scores.clone(), 0.5)
    saved = ((~mask) * costs_of(surface)).sum() * len(run.conditions) * 2
    # reading the layout costs one embedding before the run
    entry = surface.entry * 2 * len(run.conditions)
    assert run.report.full_macs - run.report.macs == int(saved) - entry


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.9, 1.0])
def test_a_share_is_met_from_below_by_no_more_than_one_sub_module(share: float) -> None:
    surface, scores = surface_of("mmdit"), random_scores("mmdit")
    costs = costs_of(surface)
    mask = computed(scores.clone(), threshold_of(scores, share, costs))
    taken = float((mask * costs).sum() / (costs.sum() * STEPS))
    least = max(share, 1 / STEPS)
    assert taken <= least + 1e-9
    assert least - taken <= float(costs.max() / (costs.sum() * STEPS)) + 1e-9


def test_a_uniform_mask_is_fora() -> None:
    from ditloom.caches.fora import Fora

    mask = torch.zeros(STEPS, sites("dit"))
    mask[[s for s in range(STEPS) if s == 0 or (STEPS - 1 - s) % 2 == 0]] = 1
    surface = surface_of("dit")
    routed, _ = by_run(toys.make("dit"), [HarmoniCa().bind(surface, Assets({SCORES: mask}))])
    fora, _ = by_run(toys.make("dit"), [Fora(interval=2).bind(surface)])
    assert torch.equal(routed, fora)


@pytest.mark.parametrize("method", [HarmoniCa, LearningToCache])
def test_what_is_refused(method: Any) -> None:
    surface = surface_of("dit")
    with pytest.raises(UserError, match="needs a calibration .* ditloom calibrate"):
        method().bind(surface)
    with pytest.raises(UserError, match="know 3 sub-modules and this model has 10"):
        method().bind(surface, Assets({SCORES: torch.ones(STEPS, 3)}))
    with pytest.raises(UserError, match=f"trained for {STEPS + 1} steps and this run has {STEPS}"):
        by_run(toys.make("dit"), [method().bind(surface, Assets({SCORES: torch.ones(STEPS + 1, 10)}))])
    for wrong in ({"threshold": 1.5}, {"share": -0.1}):
        with pytest.raises(UserError, match="0\\.\\.1"):
            method(**wrong)


def test_gates_that_are_off_or_wide_open_change_nothing() -> None:
    plain, _ = by_run(toys.make("dit"), [])
    off = Gates(STEPS, 10, 0.1, active=())
    same, _ = by_run(toys.make("dit"), [off])
    assert torch.equal(plain, same)
    wide = Gates(STEPS, 10, 0.1, active=range(1, STEPS))
    with torch.no_grad():
        for row in wide.logits:
            row.fill_(40.0)
        near, run = by_run(toys.make("dit"), [wide])
    assert run.report.count("attn", Action.MIX) > 0
    torch.testing.assert_close(plain, near)
