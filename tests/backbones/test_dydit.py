"""DyDiT: masks in training, slices at inference, and what they cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditloom.backbones.dit import DiTConfig
from ditloom.backbones.dydit import MASKS, NOISE, DyDiTConfig, from_dit
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Tap
from ditloom.contracts.plan import BlockPlan, Edit
from ditloom.parts.routers import cost_loss, gumbel_difference, mask_of
from ditloom.training.observe import Observer
from tests.backbones.portrait import LATENT
from tests.backbones.tiny import embedded, inputs, make, planned


def masks_of(backbone: Any, *args: Any) -> list[dict[str, Tensor]]:
    keep = {i: (BlockPlan(keep=MASKS), {}) for i in range(len(backbone.blocks))}
    _, kept = planned(backbone, *args, keep)
    return [kept[i] for i in range(len(backbone.blocks))]


@torch.no_grad()
def test_made_of_a_dit_it_computes_what_that_computed() -> None:
    config = DiTConfig(**LATENT, classes=10)
    dit, generator = config.build().eval(), torch.Generator().manual_seed(8)
    for p in dit.parameters():
        p.copy_(0.08 * torch.randn(p.shape, generator=generator))
    dynamic = from_dit(config, dit.state_dict()).eval()
    args = inputs(dit)
    assert torch.equal(dynamic(*args), dit(*args))
    fresh = dynamic.preset.build().eval()
    fresh.load_state_dict(fresh.grown_from(dit))
    assert torch.equal(fresh(*args), dit(*args))
    assert dynamic.grown_from(fresh).keys() == fresh.state_dict().keys()
    assert torch.equal(dynamic.complete()(*args), dit(*args))
    assert all(mask[name].all() for mask in masks_of(dynamic, *args) for name in MASKS)
    with pytest.raises(UserError, match="made of a 'dit'"):
        from_dit(replace(dynamic.preset), {})


def test_a_mask_is_a_step_with_the_gradient_of_a_sigmoid() -> None:
    logits = torch.tensor([-3.0, -0.1, 0.2, 4.0], requires_grad=True)
    mask = mask_of(logits)
    assert mask.tolist() == [0, 0, 1, 1]
    mask.sum().backward()
    soft = torch.sigmoid(logits.detach())
    torch.testing.assert_close(logits.grad, soft * (1 - soft))
    noise = torch.tensor([4.0, -1.0, -1.0, -1.0])
    logits.grad = None
    mask = mask_of(logits, noise)
    assert mask.tolist() == [1, 0, 0, 1]
    mask.sum().backward()
    soft = torch.sigmoid((logits.detach() + noise) / 5)
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / 5)


def test_noise_is_the_difference_of_two_gumbel_draws() -> None:
    """Logistic: mean 0, variance pi^2 / 3, P(noise > 1) = 1 / (1 + e)."""
    noise = gumbel_difference((200_000,), torch.Generator().manual_seed(0)).double()
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 3, rel=0.02)
    assert float((noise > 1).double().mean()) == pytest.approx(0.2689, abs=0.005)


def test_training_noise_turns_masks_and_is_the_same_again() -> None:
    backbone: Any = make("dydit")
    x, t, condition = inputs(backbone)
    noise = backbone.noise(3, 16, torch.Generator().manual_seed(1))
    noisy = replace(condition, extra={NOISE: noise})
    assert noise.shape == (3, 3, 6 + 16)
    out = backbone(x, t, noisy)
    assert torch.equal(out, backbone(x, t, noisy))
    assert not torch.allclose(out, backbone(x, t, condition), atol=1e-3)
    single = backbone(x[1:2], t[1:2], noisy.rows(slice(1, 2)))
    torch.testing.assert_close(single, out[1:2], rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"of shape \[3, 3, 22\] here; got \[3, 3, 9\]"):
        backbone(x, t, replace(condition, extra={NOISE: noise[..., :9]}))


def test_the_loss_on_the_cost_reaches_every_router_and_falls() -> None:
    backbone: Any = make("dydit")
    args = inputs(backbone)
    layout = embedded(backbone, *args)[0].layout
    routers = [p for name, p in backbone.named_parameters() if "_router." in name]
    with torch.no_grad():
        for block in backbone.blocks:
            for router in (block.head_router, block.group_router, block.token_router):
                router.open_()
                for p in router.parameters():
                    p.mul_(0.02)
    optimiser, losses = torch.optim.Adam(routers, lr=0.04), []
    for step in range(45):
        x, t, condition = args
        noise = backbone.noise(3, 16, torch.Generator().manual_seed(step))
        masks = masks_of(backbone, x, t, replace(condition, extra={NOISE: noise}))
        loss = cost_loss(backbone.executed(masks, layout), 0.5)
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            assert all(p.grad is not None and bool(p.grad.any()) for p in routers if p.ndim > 1 or len(p) > 4)
        optimiser.step()
    assert losses[0] > 0.01
    assert sum(losses[-10:]) / 10 < 0.004


@torch.no_grad()
def test_a_sliced_network_computes_what_the_masked_one_does() -> None:
    backbone: Any = make("dydit")
    x, _, condition = inputs(backbone)
    for level in (0.1, 0.5, 0.9):
        t = torch.full((3,), level, dtype=torch.float64)
        sliced = backbone.sliced(level)
        torch.testing.assert_close(sliced(x, t, condition), backbone(x, t, condition), rtol=1e-5, atol=1e-5)
        masks = masks_of(backbone, x, t, condition)
        for block, mask in zip(sliced.blocks, masks, strict=True):
            assert block.attn.heads == int(mask["head_mask"][0].sum())
            assert block.mlp.fc1.out_features == 64 * int(mask["group_mask"][0].sum())
            assert torch.equal(mask["head_mask"], mask["head_mask"][:1].expand(3, -1, -1))  # by time alone
    assert len({tuple(b.attn.heads for b in backbone.sliced(t).blocks) for t in (0.05, 0.5, 0.95)}) > 1


@torch.no_grad()
def test_the_cost_of_masks_is_what_the_sliced_network_runs() -> None:
    backbone: Any = make("dydit")
    x, _, condition = inputs(backbone)
    t = torch.full((1,), 0.5, dtype=torch.float64)
    args = (x[:1], t, condition.rows(slice(0, 1)))
    streams, context = embedded(backbone, *args)
    layout, masks, sliced = streams.layout, masks_of(backbone, *args), backbone.sliced(0.5)
    assert any(0 < float(mask["token_mask"].mean()) < 1 for mask in masks)
    executed, full = 0, 0
    for block, masked in zip(sliced.blocks, backbone.blocks, strict=True):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            streams, _ = block(streams, context)
        executed += counter.get_total_flops() // 2 - block.macs(layout)["rest"]
        costs = masked.macs(layout)
        full += costs["attn"] + costs["mlp"]
    assert float(backbone.executed(masks, layout)) == pytest.approx(executed / full, rel=1e-6)
    assert executed < full


@torch.no_grad()
def test_the_first_head_and_group_are_always_on() -> None:
    backbone: Any = make("dydit")
    for block in backbone.blocks:
        for router in (block.head_router, block.group_router):
            router.linear.bias.fill_(-50)
    masks = masks_of(backbone, *inputs(backbone))
    for mask in masks:
        assert mask["head_mask"].sum((1, 2)).tolist() == [1, 1, 1]
        assert mask["group_mask"][:, 0, 0].all()
    assert [b.attn.heads for b in backbone.sliced(0.5).blocks] == [1, 1, 1]


def test_an_objective_sees_the_masks_of_a_training_forward() -> None:
    """As the trainer asks for them: captures of one forward, with gradients into the routers."""
    backbone: Any = make("dydit")
    x, t, condition = inputs(backbone)
    noisy = replace(condition, extra={NOISE: backbone.noise(3, 16, torch.Generator().manual_seed(1))})
    wanted = {(name, block): Tap(name, block, gradient=True) for block in range(3) for name in MASKS}
    prediction, captured = Observer(backbone)(x, t, noisy, list(wanted.values()))
    torch.testing.assert_close(prediction, backbone(x, t, noisy), rtol=1e-5, atol=1e-5)
    masks = [{name: captured[wanted[name, block]] for name in MASKS} for block in range(3)]
    ratio = backbone.executed(masks, embedded(backbone, x, t, noisy)[0].layout)
    assert bool((ratio > 0).all()) and bool((ratio < 1).all())
    cost_loss(ratio, 0.5).backward()
    assert all(bool(block.head_router.linear.weight.grad.any()) for block in backbone.blocks)


def test_masks_can_be_set_from_outside() -> None:
    """All ones at the stages of the masks: the complete model."""
    backbone: Any = make("dydit")
    ones = {"head_mask": torch.ones(3, 1, 4), "group_mask": torch.ones(3, 1, 4), "token_mask": torch.ones(3, 16, 1)}
    plan = BlockPlan(edits=tuple(Edit(name, "replace", name) for name in MASKS))
    out, _ = planned(backbone, *inputs(backbone), {i: (plan, ones) for i in range(3)})
    torch.testing.assert_close(out, backbone.complete()(*inputs(backbone)), rtol=1e-6, atol=1e-6)


def test_says_what_it_cannot_do() -> None:
    with pytest.raises(UserError, match="that does not divide"):
        DyDiTConfig(depth=1, width=60, heads=9)
    with pytest.raises(UserError, match="masks the heads of softmax"):
        DyDiTConfig(depth=1, width=64, heads=4, attention="dint").build()
    with pytest.raises(UserError, match="at least 2 groups"):
        DyDiTConfig(depth=1, width=64, heads=1).build()
    backbone: Any = make("dydit")
    x, t, condition = inputs(backbone)
    with pytest.raises(UserError, match="one time per image"):
        backbone(x, t[:, None].expand(-1, 16), condition)
