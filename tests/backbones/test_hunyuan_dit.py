"""What Hunyuan-DiT claims."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.backbones.hunyuan_dit import PRESETS, HunyuanDiTConfig, HunyuanDiTSkipBlock, fitted
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Segment
from ditloom.parts.attention import logits
from ditloom.parts.attention_pool import AttentionPool
from ditloom.parts.long_skip import SkipMerge
from ditloom.parts.positions import axial_axes, grid_positions, rotary, rotate
from tests.backbones.tiny import inputs, make


def test_half_the_blocks_but_one_are_joined_last_in_first_out() -> None:
    backbone = make("hunyuan-dit")
    assert backbone.skips == {4: 1, 5: 0}
    assert [isinstance(block, HunyuanDiTSkipBlock) for block in backbone.blocks] == 4 * [False] + 2 * [True]
    with torch.device("meta"):
        published: Any = PRESETS["HunyuanDiT-g/2-v1.2"].build()
    assert len(published.skips) == 19
    assert (min(published.skips), max(published.skips)) == (21, 39)
    assert published.blocks[0].mlp.fc1.out_features == 6144


@torch.no_grad()
def test_no_simple_setting_makes_a_skip_the_identity() -> None:
    """linear = [I, 0] gives the first half of the joint norm of both, not x."""
    merge = SkipMerge(16)
    merge.linear.weight.copy_(torch.eye(16, 32))
    merge.linear.bias.zero_()
    x, skip = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    expected = torch.nn.functional.layer_norm(torch.cat([x, skip], -1), (32,), eps=1e-6)[..., :16]
    torch.testing.assert_close(merge(x, skip), expected)
    assert not torch.allclose(merge(x, skip), x, atol=0.05)


@torch.no_grad()
def test_padded_text_is_a_learned_embedding() -> None:
    backbone = make("hunyuan-dit")
    x, t, condition = inputs(backbone)
    assert condition.text is not None
    assert condition.text_mask is not None
    y = backbone(x, t, condition)
    noisy = condition.text + 9 * torch.randn(condition.text.shape) * ~condition.text_mask[..., None]
    assert torch.equal(backbone(x, t, replace(condition, text=noisy)), y)
    short = replace(condition, text=condition.text[:, :4], text_mask=condition.text_mask[:, :4])
    cut = replace(condition, text_mask=condition.text_mask & (torch.arange(6) < 4))
    assert torch.equal(backbone(x, t, short), backbone(x, t, cut))
    backbone.padding.add_(0.1)
    assert not torch.allclose(backbone(x, t, condition), y, atol=1e-3)


@torch.no_grad()
def test_t5_padding_is_replaced_for_the_blocks_and_pooled_as_it_is() -> None:
    """As published: the pooled vector reads every state of T5, also those of padding."""
    backbone: Any = make("hunyuan-dit")
    _, _, condition = inputs(backbone)
    mask = torch.tensor([[1, 1, 0, 0, 0]]).bool().expand(3, -1)
    given = replace(condition, extra={**condition.extra, "t5_mask": mask})
    noisy = given.extra["t5"] + torch.randn(3, 5, 16) * ~mask[..., None]
    a, b = backbone.prepare(given), backbone.prepare(replace(given, extra={**given.extra, "t5": noisy}))
    assert torch.equal(a.text, b.text)
    assert not torch.allclose(a.vector, b.vector, atol=1e-3)


@torch.no_grad()
def test_logits_hear_only_differences_of_position() -> None:
    places, axes = grid_positions(3, 5), axial_axes(24)
    q, k = torch.randn(2, 15, 4, 24), torch.randn(2, 15, 4, 24)

    def seen(shift: float) -> Tensor:
        table = rotary(places + shift, axes)
        return logits(rotate(q, table), rotate(k, table))

    torch.testing.assert_close(seen(0.0), seen(7.0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_pool_is_an_attention_of_the_mean() -> None:
    pool, x = AttentionPool(5, 16, 4, 24), torch.randn(3, 5, 16)
    every = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positions
    heads = []
    for h in range(4):
        at = slice(4 * h, 4 * h + 4)
        q, k, v = pool.q(every[:, :1])[..., at], pool.k(every)[..., at], pool.v(every)[..., at]
        heads.append((q @ k.mT / 2).softmax(-1) @ v)
    torch.testing.assert_close(pool(x), pool.proj(torch.cat(heads, -1))[:, 0], rtol=1e-5, atol=1e-6)


def test_grids_are_fitted_and_centred() -> None:
    for grid, start, step in (((8, 8), (0, 0), (4, 4)), ((4, 8), (8, 0), (4, 4)), ((9, 4), (0, 9), (32 / 9, 3.5))):
        found = fitted(grid, 32)
        torch.testing.assert_close(found[0], torch.tensor(start, dtype=torch.float64))
        torch.testing.assert_close(found[1], torch.tensor(step, dtype=torch.float64))
    assert torch.equal(fitted((9, 4), None)[1], torch.ones(2, dtype=torch.float64))


def test_the_last_beta_changed_between_versions() -> None:
    from ditloom.processes import process

    betas = {name: PRESETS[name].process["beta_end"] for name in PRESETS}
    assert betas == {"HunyuanDiT-g/2-v1.1": 0.03, "HunyuanDiT-g/2-v1.2": 0.02}
    assert process(PRESETS["HunyuanDiT-g/2-v1.2"].process).predicts == "v-trig+var"


@torch.no_grad()
def test_a_segment_is_placed_on_the_fitted_grid() -> None:
    backbone = make("hunyuan-dit")
    x, t, condition = inputs(backbone)
    native, memory = backbone.preset.time.native(t), backbone.prepare(condition)
    streams, context = backbone.embed(x, native, memory, [Segment("reference", x, modulation="zero")])
    cos, _ = context.rotary["image"]
    assert torch.equal(cos[:16], cos[16:])
    assert context.modulation["image"].shape == (3, 2, 96)
    assert torch.equal(streams.segment("reference"), streams.segment("image"))


def test_what_it_cannot_do_is_said() -> None:
    small = {"width": 96, "heads": 4}
    with pytest.raises(UserError, match="even"):
        HunyuanDiTConfig(depth=3, **small)
    with pytest.raises(UserError, match="head dimension 6 cannot be split"):
        HunyuanDiTConfig(depth=2, width=96, heads=16)
    with pytest.raises(UserError, match="not a multiple"):
        HunyuanDiTConfig(depth=2, width=96, heads=5).build()
    backbone = make("hunyuan-dit-sized")
    x, t, condition = inputs(backbone)
    with pytest.raises(UserError, match="reads T5's states too"):
        backbone(x, t, Condition(text=condition.text))
    with pytest.raises(UserError, match="told sizes"):
        backbone(x, t, replace(condition, extra={"t5": condition.extra["t5"]}))
    with pytest.raises(UserError, match="6 CLIP tokens; got 9"):
        backbone(x, t, replace(condition, text=torch.zeros(3, 9, 32), text_mask=None))
    native, memory = backbone.preset.time.native(t), backbone.prepare(condition)
    streams, context = backbone.embed(x, native, memory)
    with pytest.raises(UserError, match="long skip"):
        backbone.blocks[3].modulated_in(streams, context)
