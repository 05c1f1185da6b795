"""Moving averages against closed forms, and the official EDM2 numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditloom.contracts.errors import UserError
from ditloom.training.ema import PROFILES, Constant, HalfLife, Power, Ramped, Track, exponent_of, width_of

# NVlabs/edm2 training/phema.py at d8299d3c, std_to_exp
EXPONENTS = {0.05: 16.972198602303447, 0.075: 10.289116448983853, 0.1: 6.937203937601809, 0.2: 1.8262137798958404}


def followed(profile, values, batch=4):
    weights = {"w": torch.nn.Parameter(torch.tensor([values[0]]))}
    track = Track(profile, weights)
    for k, value in enumerate(values[1:], start=1):
        weights["w"].data.fill_(value)
        track.update(k * batch, batch)
    return track.averages["w"].item()


def test_constant_matches_the_geometric_sum():
    values = [1.0, 3.0, -2.0, 5.0]
    expected = values[0]
    for value in values[1:]:
        expected = 0.9 * expected + 0.1 * value
    assert followed(Constant(value=0.9), values) == pytest.approx(expected, rel=1e-6)


def test_the_ramp_starts_at_two_elevenths_and_ends_at_its_value():
    profile = Ramped(value=0.99)
    assert profile.decay(32, 32) == pytest.approx(2 / 11)
    assert profile.decay(32 * 100, 32) == pytest.approx(101 / 110)
    assert profile.decay(32 * 10_000, 32) == 0.99


def test_half_life_halves_after_its_images_whatever_the_batch():
    for batch in (1, 10, 100):
        kept = math.prod(HalfLife(images=1000, ramp=1.0).decay(10_000 + i, batch) for i in range(0, 1000, batch))
        assert kept == pytest.approx(0.5)
    assert HalfLife(images=10**9, ramp=0.1).decay(1000, 100) == pytest.approx(0.5)


@pytest.mark.parametrize("width", EXPONENTS)
def test_exponents_are_the_official_ones(width):
    assert exponent_of(width) == pytest.approx(EXPONENTS[width], rel=1e-12)


@given(st.floats(0.01, 0.27))
def test_width_and_exponent_are_inverse(width):
    assert width_of(exponent_of(width)) == pytest.approx(width, rel=1e-9)


def test_power_forgets_its_start_and_weighs_by_the_power_of_time():
    steps, profile = 400, Power(width=0.1)
    gamma = exponent_of(0.1)
    values = [math.sin(0.05 * k) for k in range(steps + 1)]
    edges = [(k / steps) ** (gamma + 1) for k in range(steps + 1)]
    expected = sum(values[k] * (edges[k] - edges[k - 1]) for k in range(1, steps + 1))
    assert followed(profile, values) == pytest.approx(expected, abs=1e-5)
    assert followed(profile, [7.0, 2.0]) == 2.0


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_keeps_a_constant_and_decays_between_0_and_1(name):
    profile = PROFILES[name]()
    assert followed(profile, [2.5] * 20) == 2.5
    assert all(0 <= profile.decay(k * 8, 8) < 1 for k in range(1, 2000))


def test_a_width_out_of_range_is_refused():
    with pytest.raises(UserError, match="between 0 and 0.28, got 0.4"):
        Power(width=0.4)


def test_averages_are_fp32_beside_lower_precision_sources_and_load_back():
    sources = {"a": torch.randn(3, 3).bfloat16(), "b": torch.randn(2)}
    track = Track(Constant(value=0.5), sources)
    assert {tensor.dtype for tensor in track.averages.values()} == {torch.float32}
    saved = {name: tensor.clone() for name, tensor in track.averages.items()}
    sources["a"].zero_(), sources["b"].zero_()
    track.update(1, 1)
    torch.testing.assert_close(track.averages["b"], saved["b"] / 2)
    track.load(saved)
    assert all(torch.equal(track.averages[name], saved[name]) for name in saved)
