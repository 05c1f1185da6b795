"""The selective scan: chunks against the sequential recurrence, values and gradients, and what compilers see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ditloom.parts import selective_scan as module
from ditloom.parts.mamba import Direction, Mamba
from ditloom.parts.selective_scan import selective_scan, sequential_scan


def given(rows: int, tokens: int, channels: int, states: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """u, dt, A, B, C, with decays from almost nothing to almost everything."""
    g = torch.Generator().manual_seed(tokens)
    u, B, C = (torch.randn(rows, tokens, n, generator=g) for n in (channels, states, states))
    dt = torch.rand(rows, tokens, channels, generator=g) ** 3 * 4
    A = -torch.rand(channels, states, generator=g) * 20
    return [t.to(dtype) for t in (u, dt, A, B, C)]


def with_gradients(scan: object, inputs: list[Tensor], weights: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = scan(*leaves)  # type: ignore[operator]
    (y * weights).sum().backward()
    return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]


@pytest.mark.parametrize("tokens", [1, 5, 32, 33, 64, 100])
@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_chunks_are_the_recurrence(tokens: int, chunk: int) -> None:
    inputs = given(3, tokens, 6, 4)
    weights = torch.randn(3, tokens, 6, generator=torch.Generator().manual_seed(0))
    expected = with_gradients(sequential_scan, inputs, weights)
    found = with_gradients(lambda *t: selective_scan(*t, chunk=chunk), inputs, weights)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_thousand_tokens_and_a_chunk_that_does_not_divide_them() -> None:
    for tokens in (1024, 1000):
        inputs = given(1, tokens, 8, 16)
        weights = torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(0))
        expected = with_gradients(sequential_scan, inputs, weights)
        for a, b in zip(with_gradients(selective_scan, inputs, weights), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_gradients_by_finite_differences() -> None:
    inputs = [t.requires_grad_() for t in given(2, 7, 3, 2, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: selective_scan(*t, chunk=3), inputs)


def test_rows_in_groups_are_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weights = given(5, 40, 6, 4), torch.ones(5, 40, 6)
    at_once = with_gradients(selective_scan, inputs, weights)
    monkeypatch.setitem(module.AT_ONCE, "cpu", 2 * 2 * 24)  # two rows of two chunks
    for a, b in zip(with_gradients(selective_scan, inputs, weights), at_once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_decay_is_a_sum_and_all_decay_forgets() -> None:
    u, dt, A, B, C = given(2, 50, 6, 4)
    h = torch.einsum("bld,bln->bldn", dt * u, B).cumsum(1)
    summed = torch.einsum("bldn,bln->bld", h, C)
    torch.testing.assert_close(selective_scan(u, dt, torch.zeros_like(A), B, C), summed, rtol=1e-4, atol=1e-4)
    alone = dt * u * (B * C).sum(-1, keepdim=True)
    forgetting = selective_scan(u, dt + 1, torch.full_like(A, -1e4), B, C)
    torch.testing.assert_close(forgetting, alone * (dt + 1) / dt, rtol=1e-4, atol=1e-4)


def test_half_precision_runs_the_recurrence_in_float32() -> None:
    inputs = given(2, 40, 6, 4, torch.bfloat16)
    y = selective_scan(*inputs)
    assert y.dtype is torch.bfloat16
    exact = sequential_scan(*(t.float() for t in inputs))
    assert torch.equal(y, exact.to(torch.bfloat16)) or float((y - exact).abs().max() / exact.abs().max()) < 5e-3


def test_one_operation_to_compilers_whose_cost_is_counted() -> None:
    inputs = given(2, 40, 6, 4)
    given_as = [t.mT.contiguous().mT.requires_grad_() for t in inputs]  # other strides than those of what comes out
    for chunk in (32, 7):
        torch.library.opcheck(torch.ops.ditloom.selective_scan, (*given_as, chunk))
    with FlopCounterMode(display=False) as counter:
        selective_scan(*inputs)
    assert counter.get_total_flops() == 2 * 2 * module.scan_macs(40, 6, 4) == 2 * 2 * 4 * 40 * 6 * 4


@torch.no_grad()
def test_reversed_tokens_with_swapped_directions_are_the_reversed_output() -> None:
    torch.manual_seed(0)
    mixer, swapped = Mamba(24), Mamba(24)
    mixer.initialise(1)
    names = {k: k.replace("ahead", "?").replace("back", "ahead").replace("?", "back") for k in mixer.state_dict()}
    swapped.load_state_dict({names[k]: v for k, v in mixer.state_dict().items()})
    h = torch.randn(2, 21, 24)
    torch.testing.assert_close(swapped(h.flip(1)), mixer(h).flip(1), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mixer(h.flip(1)), mixer(h).flip(1), atol=1e-3)


@torch.no_grad()
def test_one_direction_hears_nothing_of_what_comes_later() -> None:
    torch.manual_seed(0)
    direction = Direction(12, 2, 4)
    direction.initialise()
    x = torch.randn(1, 40, 12)
    changed = x.clone()
    changed[:, 25] += 1
    difference = (direction(changed) - direction(x)).abs().amax((0, 2))
    assert not difference[:25].any()
    assert bool((difference[25:29] > 1e-5).all())


@torch.no_grad()
def test_starts_as_published() -> None:
    torch.manual_seed(0)
    direction = Direction(4000, 8, 16)
    direction.initialise()
    torch.testing.assert_close(direction.A_log.exp(), torch.arange(1.0, 17).expand(4000, 16))
    dt = torch.nn.functional.softplus(direction.dt_proj.bias)
    assert float(dt.min()) >= 0.999e-3
    assert float(dt.max()) <= 0.1001
    assert float(dt.log().mean()) == pytest.approx(-4.605, abs=0.1)  # log-uniform: the mean of log 0.001 and log 0.1
    assert float(direction.dt_proj.weight.abs().max()) <= 8**-0.5
