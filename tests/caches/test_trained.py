"""What the papers claim of caches on trained models, on the two bundled ones; random weights do not show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import ditloom
from ditloom.caches.predictors import predictor
from ditloom.caches.static import Reuse, StaticCache, submodules, whole_stack
from ditloom.contracts.clock import Schedule
from ditloom.contracts.method import Codec
from ditloom.contracts.site import Site
from ditloom.measure.fidelity import latent_psnr
from ditloom.model import Model
from ditloom.sites.codecs import DELTA, VALUE
from ditloom.sites.surface import Surface

pytestmark = pytest.mark.slow
STEPS = 20
INPUTS: dict[str, list[Any]] = {"fashion": [0, 3, 7, 9], "emoji": ["a red apple", "rocket", "a sad cat", "bicycle"]}


@cache
def model(name: str) -> Model:
    return ditloom.load(name)


def drawn(name: str, *methods: Any) -> Tensor:
    return model(name).generate(INPUTS[name], steps=STEPS, sampler="euler", using=methods).latents


@cache
def plain(name: str) -> Tensor:
    return drawn(name)


def likeness(
    name: str, sites: Callable[[Surface], Sequence[Site]], codec: Codec, first: int, forecast: str = "hold"
) -> float:
    """PSNR of latents to the plain run, in dB, of a cache that computes every second step from one on."""

    def every_second(schedule: Schedule) -> Iterable[int]:
        return range(first, schedule.steps, 2)

    handler = StaticCache("every second", [Reuse(sites, every_second, codec, predictor(forecast))])
    return latent_psnr(drawn(name, handler), plain(name))


@pytest.mark.parametrize("name", INPUTS)
def test_a_straight_line_beats_holding_in_the_smooth_part(name: str) -> None:
    """At the same steps from a third of the run on, by far; of every sub-module and of the whole stack (TaylorSeer)."""
    for sites, codec in ((submodules, VALUE), (whole_stack, DELTA)):
        held, line = (likeness(name, sites, codec, 7, rule) for rule in ("hold", "taylor:order=1"))
        assert line > held + 3, (held, line)


def blocks(first: float, last: float) -> Callable[[Surface], Sequence[Site]]:
    """A range of the stack, by shares."""
    return lambda surface: [surface.range(round(first * surface.blocks), round(last * surface.blocks))]


@pytest.mark.parametrize("name, share", [("emoji", (0.25, 0.75)), ("fashion", (0.5, 1))])
def test_a_change_added_to_what_is_there_beats_the_value(name: str, share: tuple[float, float]) -> None:
    """Delta-DiT's claim, where it holds here: of the middle of emoji and the rear of fashion. Elsewhere they are even,
    and the value is the better of the middle of fashion.
    """
    delta, value = (likeness(name, blocks(*share), codec, 3) for codec in (DELTA, VALUE))
    assert delta > value


def test_late_reuse_harms_less_than_early_reuse() -> None:
    """The same number of steps, on fashion; on emoji the two are even."""
    name = "fashion"

    def in_steps(steps: range) -> float:
        reuse = Reuse(whole_stack, lambda schedule: steps[1::2], DELTA)
        return latent_psnr(drawn(name, StaticCache("window", [reuse])), plain(name))

    assert in_steps(range(12, 20)) > in_steps(range(0, 8)) + 3


@pytest.mark.parametrize("name", INPUTS)
def test_mixing_grains_is_no_worse_than_the_worst_of_them(name: str) -> None:
    """MixCache, its reconstruction: for the MACs it saves it is at least as close as its worst single grain."""
    common = "mixcache:interval=2,kappa=1e9,stable=1"
    mixed = latent_psnr(drawn(name, common), plain(name))
    alone = [latent_psnr(drawn(name, f"{common},grains={grain}"), plain(name)) for grain in ("step", "cfg", "block")]
    assert mixed >= min(alone)


@pytest.mark.parametrize("name", INPUTS)
def test_pre_gate_broadcast_follows_range(name: str) -> None:
    """The further attention is broadcast, the less alike (PAB)."""
    found = [latent_psnr(drawn(name, f"pab:spatial={n},low=0.0"), plain(name)) for n in (2, 3, 5)]
    assert found == sorted(found, reverse=True) and all(torch.isfinite(torch.tensor(found)))
