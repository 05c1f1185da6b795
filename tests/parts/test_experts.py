"""Experts against a loop over tokens, and what routing promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout
from ditloom.contracts.plan import BlockPlan
from ditloom.parts.experts import GELUExperts, MoE, Router, SwiGLUExperts, balance_loss, shares
from ditloom.parts.feed_forward import MLP, SwiGLU
from ditloom.parts.grouped import grouped_linear
from ditloom.sites.visit import visit

WIDTH, HIDDEN = 24, 20
KINDS = {"swiglu": SwiGLUExperts, "gelu": GELUExperts}


def moe(kind: str = "swiglu", experts: int = 5, top_k: int = 2, scale: float = 1.0) -> MoE:
    torch.manual_seed(0)
    shared: Any = SwiGLU(WIDTH, 8, bias=False) if kind == "swiglu" else MLP(WIDTH, 8)
    made = MoE(Router(WIDTH, experts, top_k), KINDS[kind](experts, WIDTH, HIDDEN), shared, scale)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return made


def tokens(rows: int = 3, n: int = 7) -> Tensor:
    return torch.randn(rows, n, WIDTH, generator=torch.Generator().manual_seed(1))


def one(made: MoE, e: int, x: Tensor) -> Tensor:
    """Expert e alone over x, with plain matrix products."""
    experts: Any = made.experts
    if isinstance(experts, SwiGLUExperts):
        gate, value = (x @ experts.w12[e].T).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * value) @ experts.w3[e].T
    hidden = torch.nn.functional.gelu(x @ experts.fc1[e].T + experts.bias[e], approximate="tanh")
    return hidden @ experts.fc2[e].T


def naive(made: MoE, x: Tensor) -> Tensor:
    """Token by token."""
    y = torch.zeros_like(x)
    scores = (x @ made.router.weight.T).softmax(-1)
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            for e in scores[b, n].topk(made.router.top_k).indices:
                y[b, n] += made.scale * scores[b, n, e] * one(made, int(e), x[b, n])
    return y + made.shared(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("experts", "top_k"), [(5, 2), (4, 4), (1, 1), (16, 1)])
def test_is_a_loop_over_tokens(kind: str, experts: int, top_k: int) -> None:
    """Forward and every gradient; experts without a token (of 16) have a gradient of zero."""
    made, x = moe(kind, experts, top_k, scale=1.5), tokens()
    results = []
    for run in (made, lambda x: naive(made, x)):
        made.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in made.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_gradients_of_grouped_products_by_finite_differences() -> None:
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, ends), (x, weight))
    torch.library.opcheck(torch.ops.ditloom.grouped_linear, (x, weight, ends))


@torch.no_grad()
def test_identical_experts_are_one_expert_by_the_sum_of_gates() -> None:
    made, x = moe(experts=4), tokens()
    for name in ("w12", "w3"):
        stacked = getattr(made.experts, name)
        stacked.copy_(stacked[:1].expand_as(stacked))
    _, gates, _ = made.router(x)
    assert bool((gates.sum(-1) < 1).all())  # not normalised again
    expected = gates.sum(-1, keepdim=True) * one(made, 0, x) + made.shared(x)
    torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_single_expert_has_gate_one() -> None:
    made, x = moe(experts=1, top_k=1), tokens()
    torch.testing.assert_close(made(x), one(made, 0, x) + made.shared(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_tokens_route_the_same_alone_and_in_any_company(dtype: torch.dtype) -> None:
    made, x = moe(experts=8).to(dtype), tokens(5, 40).to(dtype)
    chosen = made.router(x)[2]
    assert all(torch.equal(made.router(x[i : i + 1])[2][0], chosen[i]) for i in range(5))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(made.router(x[:, order])[2], chosen[:, order])
    torch.testing.assert_close(made(x[:, order]), made(x)[:, order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made(x[2:3]), made(x)[2:3], rtol=1e-5, atol=1e-5)
    assert torch.equal(made(x), made(x))


@torch.no_grad()
def test_equal_scores_go_to_the_first_experts() -> None:
    made, x = moe(experts=6), tokens()
    made.router.weight.zero_()
    assert made.router(x)[2].unique().tolist() == [0, 1]


def kept(made: MoE, x: Tensor) -> Tensor:
    at: Any = visit(BlockPlan(keep=("balance",)), {}, Layout(()))
    made(x, at)
    return at.kept["balance"]


def test_balance_is_handed_out_only_when_asked() -> None:
    made, x = moe(), tokens()
    at: Any = visit(BlockPlan(keep=("ff_hidden",)), {}, Layout(()))
    made(x, at)
    assert list(at.kept) == ["ff_hidden"]
    assert kept(made, x).shape == (3, 2, 5)


def test_balance_loss_is_one_where_routing_is_uniform_and_reaches_the_router() -> None:
    probabilities = torch.full((3, 4), 0.25)
    uniform = shares(torch.arange(4).repeat(3, 2)[:, :, None].expand(-1, -1, 1), 4)
    assert torch.equal(uniform, probabilities)
    assert float(balance_loss(torch.stack([uniform, probabilities], 1))) == pytest.approx(1.0)
    collapsed = torch.eye(4)[:1].expand(3, -1)
    assert float(balance_loss(torch.stack([collapsed, collapsed], 1))) == pytest.approx(4.0)
    made, x = moe(), tokens()
    loss = balance_loss(kept(made, x))
    loss.backward()
    assert bool(made.router.weight.grad.abs().sum() > 0)
    assert float(loss.detach()) > 0.9


def test_only_active_experts_are_counted_and_run() -> None:
    made, x = moe(experts=7, top_k=3), tokens(1, 11)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(x)
    by_hand = 11 * (7 * WIDTH + 3 * 3 * WIDTH * HIDDEN + 3 * WIDTH * 8)
    assert counter.get_total_flops() == 2 * made.macs(11) == 2 * by_hand


def test_more_experts_per_token_than_there_are_is_refused() -> None:
    for top_k in (0, 5):
        with pytest.raises(UserError, match=f"{top_k} experts per token cannot be chosen among 4"):
            Router(WIDTH, 4, top_k)


def test_compiles_in_one_graph_whatever_the_routing() -> None:
    made = moe()
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(compiled(x), made(x), rtol=1e-5, atol=1e-5)
    compiled(x).sum().backward()
    torch._dynamo.reset()
