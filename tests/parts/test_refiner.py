"""The refiner of text tokens against its equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditloom.parts.refiner import RefinerLayer, TokenRefiner

WIDTH, HEADS = 24, 3


def randomised(module: nn.Module) -> Any:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return module


def tokens(n: int, seed: int = 1, rows: int = 2) -> Tensor:
    return torch.randn(rows, n, WIDTH, generator=torch.Generator().manual_seed(seed))


C = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(9))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (heads(q) @ heads(k).mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
    return (weights @ heads(v)).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_a_layer_is_its_equations() -> None:
    layer = randomised(RefinerLayer(WIDTH, HEADS, 4.0, None, crossed=True))
    x, other = tokens(5), tokens(4, 2)
    b = F.linear(F.silu(C), layer.modulation.linear.weight, layer.modulation.linear.bias)[:, None].chunk(9, -1)
    mod = lambda x, n: F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + b[3 * n + 1]) + b[3 * n]  # noqa: E731
    q, k, v = layer.attn.qkv(mod(x, 0)).chunk(3, -1)
    y = x + b[2] * layer.attn.proj(softmax_attention(q, k, v))
    k, v = layer.cross.kv(other).chunk(2, -1)
    y = y + b[5] * layer.cross.proj(softmax_attention(layer.cross.q(mod(y, 1)), k, v))
    y = y + b[8] * layer.mlp(mod(y, 2))
    torch.testing.assert_close(layer(x, None, C[:, None], other, None), y, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tokens_have_no_order_and_the_first_hears_the_last() -> None:
    refiner = randomised(TokenRefiner(WIDTH, HEADS, 2))
    x, order = tokens(6), torch.tensor([3, 0, 5, 1, 4, 2])
    (y,) = refiner([x], [None], C)
    torch.testing.assert_close(refiner([x[:, order]], [None], C)[0], y[:, order], rtol=1e-5, atol=1e-5)
    changed = x.clone()
    changed[:, -1] = tokens(6, 3)[:, -1]
    assert not torch.allclose(refiner([changed], [None], C)[0][:, 0], y[:, 0], atol=1e-3)


@torch.no_grad()
def test_branches_hear_each_other_as_they_were() -> None:
    """All move at the same time, and padding of one is not heard by another."""
    refiner = randomised(TokenRefiner(WIDTH, HEADS, 1, branches=2))
    a, b = tokens(5), tokens(4, 2)
    together = refiner([a, b], [None, None], C)
    first, second = refiner.layers[0]
    torch.testing.assert_close(together[0], first(a, None, C[:, None], b, None))
    torch.testing.assert_close(together[1], second(b, None, C[:, None], a, None))
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    noise = torch.where(mask[..., None], b, torch.tensor(7.0))
    for one, other in zip(refiner([a, b], [None, mask], C), refiner([a, noise], [None, mask], C), strict=True):
        real = mask if one.shape[1] == 4 else torch.ones(2, 5, dtype=torch.bool)
        torch.testing.assert_close(one[real], other[real], rtol=1e-5, atol=1e-5)
    short = refiner([a[:1], b[:1, :2]], [None, None], C[:1])
    torch.testing.assert_close(refiner([a, b], [None, mask], C)[0][:1], short[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_branch_may_stay_away() -> None:
    refiner = randomised(TokenRefiner(WIDTH, HEADS, 2, branches=2))
    (alone,) = refiner([tokens(5)], [None], C)
    assert alone.shape == (2, 5, WIDTH)
    assert not torch.allclose(alone, refiner([tokens(5), tokens(4, 2)], [None, None], C)[0], atol=1e-3)


@pytest.mark.parametrize("lengths", [(5,), (5, 4), (5, 4, 3)])
def test_cost_is_what_runs(lengths: tuple[int, ...]) -> None:
    refiner = TokenRefiner(WIDTH, HEADS, 2, branches=len(lengths))
    texts = [tokens(n, n, rows=1) for n in lengths]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        refiner(texts, [None] * len(lengths), C[:1])
    assert counter.get_total_flops() == 2 * refiner.macs(lengths)


def test_it_takes_out_the_bias_of_a_causal_encoder() -> None:
    """A causal encoder cannot tell the first token what comes last; a linear probe on it learns to, behind a refiner.

    The words are 4 random vectors, the encoder a running mean, the question which word is the last of three.
    """
    torch.manual_seed(0)
    words, accuracy = torch.randn(4, WIDTH), {}
    which = torch.randint(4, (256, 3))
    causal = words[which].cumsum(1) / torch.arange(1, 4)[:, None]
    for refined in (False, True):
        refiner, probe = TokenRefiner(WIDTH, HEADS, 1), nn.Linear(WIDTH, 4)
        with torch.no_grad():
            refiner.layers[0][0].modulation.linear.bias.fill_(0.5)  # type: ignore[index,union-attr]
        learner = torch.optim.Adam([*refiner.parameters(), *probe.parameters()], lr=5e-3)
        c = torch.zeros(256, WIDTH)
        for _ in range(200):
            x = refiner([causal], [None], c)[0] if refined else causal
            loss = F.cross_entropy(probe(x[:, 0]), which[:, 2])
            learner.zero_grad()
            loss.backward()
            learner.step()
        accuracy[refined] = float((probe(x[:, 0]).argmax(1) == which[:, 2]).float().mean())
    assert accuracy[False] < 0.5
    assert accuracy[True] > 0.9
