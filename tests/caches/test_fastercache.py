"""FasterCache: each part alone and together, against loops by hand; bands of frequency; the published steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.caches.codecs import BandGap, BandScale, disc
from ditloom.caches.fastercache import FasterCache
from ditloom.contracts.clock import Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.streams import Context, Streams
from tests.caches.acting import REUSE, bound, counted, drawn, steps_of
from tests.sites import toys
from tests.sites.driving import by_hand, by_run, follow, loop, moved, same, start

ALONE = "fastercache:guidance=False,attention_start=0.0"
GUIDED = "fastercache:attention=False,guidance_start=0.2,interval=3,switch=0.7"


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_attention_against_a_loop(weight: float) -> None:
    """Odd steps add the last change once more, by its weight; step 1 has one value only and is computed."""
    model = toys.make("dit")
    kept: dict[int, list[Tensor]] = {}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        def call(i: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
            if s in (3, 5):
                before, last = kept[i]
                found = {"attn": last + weight * (last - before)}
                return block(streams, context, BlockPlan((("attn", REUSE),)), {**given, **found})
            streams, now = block(streams, context, BlockPlan(keep=("attn",)), given)
            kept[i] = [*kept.get(i, []), now["attn"]][-2:]
            return streams, now

        return loop(model, streams, context, call)

    expected = by_hand(model, step)
    got, run = drawn(model, f"{ALONE},weight={weight}")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert run.report.count("attn", REUSE) == 2 * 2 * 5 and run.report.count("mlp", REUSE) == 0


def test_weight_zero_is_a_broadcast_of_two() -> None:
    """From the step on where two values are known."""
    model = toys.make("mmdit")
    faster = drawn(model, "fastercache:guidance=False,attention_start=0.4,weight=0.0")[0]
    assert same(faster, drawn(model, "pab:spatial=2,low=0.0,high=0.6")[0])


def bands(gap: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high parts by a shifted spectrum and a centred disc, as the official script has it."""
    h, w = gap.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h) - h // 2, torch.arange(w) - w // 2, indexing="ij")
    mask = (x**2 + y**2 <= (min(h, w) // 5) ** 2).float()
    spectrum = torch.fft.fftshift(torch.fft.fft2(gap), dim=(-2, -1))
    back = lambda s: torch.fft.ifft2(torch.fft.ifftshift(s, dim=(-2, -1))).real  # noqa: E731
    return back(spectrum * mask), back(spectrum * (1 - mask))


def test_guidance_against_a_loop() -> None:
    """Both branches on steps 0, 2 and 5; the low band grows by 1.1 a step up to 0.7, then the high band."""
    model, x = toys.make("dit"), toys.latent()
    plain = start(model)
    low = high = torch.zeros(())
    with torch.no_grad():
        for s in range(6):
            out = plain.predict(x, plain.schedule.clock(s))
            if s in (0, 2, 5):
                low, high = bands(out["uncond"] - out["cond"])
            else:
                low, high = (1.1 * low, high) if s < 4 else (low, 1.1 * high)
                out["uncond"] = out["cond"] + low + high
            x = moved(x, out)
    got, run = drawn(model, GUIDED)
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)
    assert steps_of(run, "branch(uncond)") == [1, 3, 4] and run.report.forwards == 9


@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_without_growth_it_is_the_guidance_gate(name: str) -> None:
    """The bands are a partition: up to the rounding of a Fourier transform nothing is left of them."""
    model = toys.make(name)
    split = drawn(model, f"{GUIDED},low=1.0,high=1.0")[0]
    torch.testing.assert_close(split, drawn(model, "guidance-gate:start=1,interval=3")[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 3, 5, 7), (1, 2, 3, 16, 12)])
def test_bands_are_a_partition(shape: tuple[int, ...]) -> None:
    """x and y come back, and each band is real: the disc is symmetric, on odd sizes as well."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=g) for _ in range(2))
    codec = BandGap()
    z = codec.encode(x, y)
    torch.testing.assert_close(codec.decode(x, z), y, atol=1e-6, rtol=1e-6)
    for mine, official in zip((z["low"], z["high"]), bands(y - x), strict=True):
        torch.testing.assert_close(mine, official, atol=1e-5, rtol=1e-5)
    spectrum = torch.fft.ifft2(torch.fft.fft2(y - x) * disc(*shape[-2:], 5))
    assert float(spectrum.imag.abs().max()) < 1e-5
    assert codec.encode(x.bfloat16(), y.bfloat16())["low"].dtype == torch.float32, "a transform of its own precision"


def test_growth_compounds_until_refreshed() -> None:
    scale = BandScale(2.0, 3.0, switch=0.5).on(Schedule(tuple(1 - s / 10 for s in range(11)), ()))
    one = {"low": torch.ones(1), "high": torch.ones(1)}
    grown = {s: scale([(2, one)], s) for s in (3, 4, 5, 6)}
    assert [(float(z["low"]), float(z["high"])) for z in grown.values()] == [(2, 1), (4, 1), (4, 3), (4, 9)]


def test_the_published_steps() -> None:
    """Fifty steps of the official Latte script, its counter from 1: attention on even counts from 16, both branches
    up to 17 and on multiples of 5, which then compute their attention."""
    plan = Schedule(tuple(1 - s / 50 for s in range(51)), (), ("cond", "uncond"))
    counts = range(1, 51)
    gated = {c for c in counts if c >= 18 and c % 5}
    reused = {c for c in counts if c >= 16 and c % 2 == 0 and (c < 18 or c % 5)}
    settings = FasterCache()
    assert {s + 1 for s in settings.gated(plan)} == gated
    assert {s + 1 for s in settings.extrapolated(plan)} == reused
    scale: Any = BandScale(1.1, 1.1, settings.switch).on(plan)
    ones = {"low": torch.ones(1, dtype=torch.float64), "high": torch.ones(1, dtype=torch.float64)}
    assert float(scale([(39, ones)], 43)["high"]) == 1 and float(scale([(39, ones)], 44)["high"]) == 1.1


def test_both_parts_together() -> None:
    """One method may predict the branch and the attentions of what is left."""
    model = toys.make("mmdit")
    run = start(model, [bound("fastercache:attention_start=0.0,guidance_start=0.4,interval=4", model)], steps=8)
    with counted() as macs:
        follow(run)
    assert run.report.macs == macs[0]
    assert steps_of(run, "branch(uncond)") == [4, 5, 6] and steps_of(run, "attn(0)") == [5]


def test_without_an_unconditional_branch_the_first_part_is_left() -> None:
    model = toys.make("dit")
    run = start(model, [bound("fastercache", model)], branches=("cond",))
    follow(run)
    assert steps_of(run, "attn(0)") == [3, 5]


def test_a_start_at_the_end_changes_no_bit() -> None:
    model = toys.make("mmdit")
    off = "fastercache:attention_start=1.0,guidance_start=1.0"
    assert same(drawn(model, off)[0], by_run(model)[0])


def test_a_rising_weight() -> None:
    """0 on the first step, all of it on the last."""
    model = toys.make("dit")
    rising = drawn(model, f"{ALONE},weight=1.0,rising=True")[0]
    assert not torch.allclose(rising, drawn(model, f"{ALONE},weight=1.0")[0], atol=1e-5)


@pytest.mark.parametrize(
    "spec, sentence",
    [
        (
            "fastercache:attention=False,guidance=False",
            "^fastercache does nothing with attention and guidance",
        ),
        ("fastercache:interval=0", "^interval is a whole number of at least 1"),
        ("fastercache:guidance_start=17", "^guidance_start is a share in 0..1; got 17$"),
    ],
)
def test_bad_input(spec: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        bound(spec, toys.make("dit"))
