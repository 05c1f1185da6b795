"""Frechet distance against closed forms and scipy's matrix root."""

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditloom.contracts.errors import UserError
from ditloom.measure.frechet import Moments, RunningMoments, frechet_distance, moments_of, trace_of_root


def features(count: int, width: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=draw)
    return torch.randn(count, width, generator=draw) @ mix + torch.randn(width, generator=draw)


@given(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(0, 4), st.floats(0, 4)), min_size=1, max_size=8)
)
@settings(deadline=None, max_examples=50)
def test_diagonal_gaussians_have_the_closed_form(rows):
    m1, m2, s1, s2 = torch.tensor(rows, dtype=torch.float64).T
    a, b = Moments(9, m1, torch.diag(s1**2)), Moments(9, m2, torch.diag(s2**2))
    expected = ((m1 - m2) ** 2 + (s1 - s2) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("count", [20, 500])
def test_a_set_is_at_distance_zero_from_itself_even_with_a_singular_covariance(count):
    moments = Moments.of(features(count, 64))
    assert frechet_distance(moments, moments) < 1e-6 * float(moments.covariance.trace())


def test_it_is_symmetric_and_positive():
    a, b = Moments.of(features(300, 32, 1)), Moments.of(features(200, 32, 2))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, b) > 1


def test_the_trace_of_the_root_is_that_of_scipy():
    a, b = Moments.of(features(300, 24, 1)).covariance, Moments.of(features(300, 24, 2)).covariance
    expected = scipy.linalg.sqrtm(a.numpy() @ b.numpy()).real.trace()
    assert float(trace_of_root(a, b)) == pytest.approx(expected, rel=1e-9)


def test_moments_are_those_of_torch():
    x = features(50, 6).double()
    moments = Moments.of(x)
    assert torch.allclose(moments.mean, x.mean(0), atol=1e-12)
    assert torch.allclose(moments.covariance, torch.cov(x.T), atol=1e-12)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) >= 2))
@settings(deadline=None, max_examples=30)
def test_streams_and_ranks_give_the_moments_of_the_whole(sizes):
    x = features(sum(sizes), 5) + 1e4
    whole = Moments.of(x)
    parts = x.split(sizes)
    merged = RunningMoments()
    for part in reversed(parts):
        merged.merge(RunningMoments().update(part))
    for found in (moments_of(parts), merged.moments()):
        assert found.count == len(x)
        assert torch.allclose(found.mean, whole.mean, rtol=1e-12)
        assert torch.allclose(found.covariance, whole.covariance, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("bad", "said"), [(torch.zeros(1, 4), "at least 2"), (torch.zeros(4), "N, d"), (torch.zeros(0, 4), "got 0")]
)
def test_too_few_or_misshapen_features_are_refused(bad, said):
    with pytest.raises(UserError, match=said):
        Moments.of(bad)


def test_unlike_widths_are_refused():
    with pytest.raises(UserError, match="4 and of 6"):
        frechet_distance(Moments.of(features(9, 4)), Moments.of(features(9, 6)))
