"""What is special about Dense2MoE: a dense FLUX cut into experts, and blocks that images may skip."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditloom.backbones.dense2moe import PRESETS, RUNS, Dense2MoEConfig
from ditloom.backbones.flux import FluxConfig
from ditloom.contracts.errors import UserError
from ditloom.contracts.plan import BlockPlan
from ditloom.parts.experts import MoE, balance_loss
from ditloom.parts.feed_forward import MLP
from tests.backbones.tiny import TINY, embedded, inputs, make


def dense_of(config: Dense2MoEConfig) -> Any:
    """A random dense FLUX of the same sizes."""
    own = ("shared", "experts", "top_k", "groups", "group", "active")
    dense: Any = FluxConfig(**{k: v for k, v in vars(config).items() if k not in own}).build().eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in dense.parameters():
            p.copy_(0.08 * torch.randn(p.shape, generator=g))
    return dense


def cut(moe: MoE, mlp: MLP, order: Tensor) -> None:
    """The hidden units of a dense feed-forward in this order: first the shared expert's, then the others'."""
    experts: Any = moe.experts
    shared: Any = moe.shared
    n, (e, each, _) = shared.fc1.out_features, experts.fc1.shape
    rows, bias, columns = mlp.fc1.weight[order], mlp.fc1.bias[order], mlp.fc2.weight[:, order]
    shared.fc1.weight.copy_(rows[:n])
    shared.fc1.bias.copy_(bias[:n])
    shared.fc2.weight.copy_(columns[:, :n])
    if mlp.fc2.bias is not None:
        shared.fc2.bias.copy_(mlp.fc2.bias)
    experts.fc1.copy_(rows[n:].unflatten(0, (e, each)))
    experts.bias.copy_(bias[n:].unflatten(0, (e, each)))
    experts.fc2.copy_(columns[:, n:].unflatten(1, (e, each)).transpose(0, 1))
    moe.router.weight.zero_()


@torch.no_grad()
def converted(config: Dense2MoEConfig, dense: Any, seed: int | None = None) -> Any:
    """The dense network cut into experts, hidden units in their order or shuffled."""
    sparse: Any = config.build().eval()
    theirs = dense.state_dict()
    sparse.load_state_dict({k: theirs.get(k, v) for k, v in sparse.state_dict().items()}, strict=True)
    generator = torch.Generator().manual_seed(seed or 0)
    units = config.hidden
    for name, moe in sparse.named_modules():
        if isinstance(moe, MoE):
            order = torch.arange(units) if seed is None else torch.randperm(units, generator=generator)
            cut(moe, dense.get_submodule(name), order)
    return sparse


@pytest.mark.parametrize("seed", [None, 0])
@torch.no_grad()
def test_all_experts_together_are_the_dense_network(seed: int | None) -> None:
    """With every expert chosen and uniform gates; in whatever order the hidden units were cut."""
    config = replace(TINY["dense2moe"], top_k=4)
    dense = dense_of(config)
    args = inputs(dense)
    torch.testing.assert_close(converted(config, dense, seed)(*args), dense(*args), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_running_all_blocks_of_a_group_is_running_without_groups() -> None:
    grouped: Any = make("dense2moe-blocks")
    config = replace(grouped.preset, active=3)
    every = config.build().eval()
    every.load_state_dict(grouped.state_dict())
    plain = replace(config, groups=()).build().eval()
    plain.load_state_dict({k: v for k, v in grouped.state_dict().items() if not k.startswith("routers.")})
    args = inputs(grouped)
    assert torch.equal(every(*args), plain(*args))
    assert not torch.allclose(grouped(*args), plain(*args), atol=1e-3)


def test_hidden_units_are_cut_without_overlap_and_three_eighths_are_active() -> None:
    config = PRESETS["Dense2MoE-FLUX-experts"]
    with torch.device("meta"):
        sparse: Any = config.build()
    moe = sparse.blocks[0].image.mlp
    shared, each = moe.shared.fc1.out_features, moe.experts.fc1.shape[1]
    assert shared + config.experts * each == 4 * 3072
    routers = config.experts * 3072
    dense = 2 * 3072 * 4 * 3072
    assert moe.macs(1) - routers == dense * 3 // 8


def test_active_parameters_of_the_published_size() -> None:
    """5.2B of 12B: what a token of an image runs through."""
    config = PRESETS["Dense2MoE-FLUX-L"]
    with torch.device("meta"):
        sparse: Any = config.build()
    active = sum(p.numel() for n, p in sparse.named_parameters() if not n.startswith("blocks."))
    for block in (b for b in sparse.blocks if not b.is_transition):
        own = sum(p.numel() for p in block.parameters())
        idle = sum(
            p.numel() * (config.experts - config.top_k) // config.experts
            for n, p in block.named_parameters()
            if ".experts." in n
        )
        active += (own - idle) * (config.active / config.group if block.share else 1)
    assert active == pytest.approx(5.2e9, rel=0.02)


@torch.no_grad()
def test_every_image_runs_its_own_blocks() -> None:
    backbone: Any = make("dense2moe-blocks")
    x, t, condition = inputs(backbone)
    streams, context = embedded(backbone, x, t, condition)
    runs = torch.stack([backbone.handed(p, context)[RUNS] for p in (3, 4, 5)])
    assert runs.sum(0).tolist() == [2, 2, 2]
    assert len(runs.unique(dim=1).T) > 1  # not the same for all
    assert all(backbone.handed(p, context) == {} for p in (0, 1, 2, 6, 7))
    for position in (0, 1, 2):
        streams, _ = backbone.blocks[position](streams, context)
    for position, expected in zip((3, 4, 5), runs, strict=True):
        out, _ = backbone.blocks[position](streams, context, None, backbone.handed(position, context))
        assert torch.equal((out["image"] != streams["image"]).flatten(1).any(1), expected)


@torch.no_grad()
def test_a_block_that_no_image_runs_is_not_computed() -> None:
    backbone: Any = make("dense2moe-blocks")
    x, t, condition = inputs(backbone, batch=1)
    called = []
    for position, block in enumerate(backbone.blocks):
        block.register_forward_hook(lambda *_, p=position: called.append(p))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        backbone(x, t, condition)
    streams, context = embedded(backbone, x, t, condition)
    chosen = [p for p in (3, 4, 5) if bool(backbone.handed(p, context)[RUNS])]
    assert len(chosen) == 2
    assert called == [0, 1, 2, *chosen, 6, 7]
    assert counter.get_total_flops() == 2 * backbone.macs(streams.layout)


def test_in_training_every_router_learns_and_a_plan_hands_out_the_balance() -> None:
    backbone: Any = make("dense2moe-blocks")
    x, t, condition = inputs(backbone)
    backbone(x, t, condition).square().sum().backward()
    assert bool(backbone.routers[0].weight.grad.abs().sum() > 0)
    streams, context = embedded(backbone, x, t, condition)
    for position in (0, 1, 2):
        streams, _ = backbone.blocks[position](streams, context)
    plan = BlockPlan(keep=("balance", "block_balance"))
    _, kept = backbone.blocks[3](streams, context, plan, backbone.handed(3, context))
    assert kept["balance"].shape == (3, 2, 4)
    assert kept["block_balance"].shape == (3, 2, 3)
    backbone.zero_grad()
    (balance_loss(kept["balance"]) + balance_loss(kept["block_balance"])).backward()
    assert backbone.routers[0].weight.grad is not None
    assert backbone.blocks[3].mlp.router.weight.grad is not None


@torch.no_grad()
def test_the_gate_changes_no_value() -> None:
    """Straight-through: with gradients recorded the prediction is what it is without."""
    backbone: Any = make("dense2moe-blocks")
    args = inputs(backbone)
    plain = backbone(*args)
    with torch.enable_grad():
        torch.testing.assert_close(backbone(*args).detach(), plain, rtol=1e-6, atol=1e-6)


def test_balance_loss_is_least_where_the_load_is_even() -> None:
    """Gradient descent on it alone evens out a lopsided router."""
    torch.manual_seed(0)
    moe: Any = make("dense2moe").blocks[0].image.mlp
    x = torch.randn(4, 64, 96) + 1.0
    with torch.no_grad():
        moe.router.weight[0] += 0.05
    learner = torch.optim.SGD([moe.router.weight], lr=0.02)
    loads = []
    for _ in range(100):
        probabilities, _, chosen = moe.router(x)
        share = nn.functional.one_hot(chosen.flatten(1), 4).float().mean(1)
        loads.append(share.mean(0))
        loss = balance_loss(torch.stack([share, probabilities.mean(1)], dim=1))
        learner.zero_grad()
        loss.backward()
        learner.step()
    assert float(loads[0].max() - loads[0].min()) > 0.4
    assert float(loads[-1].max() - loads[-1].min()) < 0.1


def test_units_that_matter_belong_into_the_shared_expert() -> None:
    """Of cuts with equal active share the one by importance |a dL/da| errs less, before any training."""
    torch.manual_seed(0)
    config = TINY["dense2moe"]
    mlp = MLP(96, 384)
    with torch.no_grad():
        mlp.fc2.weight.mul_(torch.linspace(0.05, 3.0, 384)[torch.randperm(384)])
    x = torch.randn(8, 16, 96)
    hidden = nn.functional.gelu(mlp.fc1(x), approximate="tanh").detach().requires_grad_()
    target = mlp.fc2(hidden)
    (target.square().mean()).backward()
    assert hidden.grad is not None
    importance = (hidden * hidden.grad).abs().mean((0, 1))
    errors = {}
    with torch.no_grad():
        for name, order in (("taylor", importance.argsort(descending=True)), ("random", torch.randperm(384))):
            moe: Any = config.build().blocks[0].image.mlp
            cut(moe, mlp, order)
            errors[name] = float((moe(x) - target).square().mean())
    assert errors["taylor"] < 0.5 * errors["random"]


def test_what_does_not_fit_is_said_at_construction() -> None:
    small = {**vars(TINY["dense2moe"])}
    for change, message in (
        ({"top_k": 5}, "5 experts per token cannot be chosen among 4"),
        ({"experts": 7}, "384 hidden units cannot be cut"),
        ({"active": 5}, "5 blocks cannot be chosen in a group of 4"),
        ({"groups": (1,), "group": 2, "active": 1}, "is not inside the 2 double or the 3 single blocks"),
        ({"groups": (2, 3), "group": 2, "active": 1}, "overlap"),
    ):
        with pytest.raises(UserError, match=message):
            Dense2MoEConfig(**{**small, **change})


def test_groups_cost_their_active_blocks() -> None:
    backbone: Any = make("dense2moe-blocks")
    layout = embedded(backbone, *inputs(backbone))[0].layout
    plain: Any = replace(backbone.preset, groups=()).build()
    joined = backbone.blocks[2].after(layout)
    group = [backbone.blocks[p].macs(joined) for p in (3, 4, 5)]
    every = plain.blocks[3].macs(joined)
    assert {site: sum(costs[site] for costs in group) for site in every} == {k: 2 * v for k, v in every.items()}
