"""FlexDiT: pooling, merging, recovering; densities by time; what a DiT becomes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ditloom.backbones.dit import DiTConfig
from ditloom.backbones.flexdit import PRESETS, FlexDiTConfig, MergeBlock, Pool, RecoverBlock, from_dit, kinds
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment, Span
from ditloom.contracts.streams import Context
from ditloom.parts.attention import SelfAttention
from ditloom.parts.density import MeanAttention, pooled, repeated
from ditloom.sites.rules import Isolate, rule
from tests.backbones.portrait import LATENT
from tests.backbones.tiny import TINY, embedded, inputs, make

MATH = torch.nn.attention.SDPBackend.MATH
SMALL: dict[str, Any] = {**LATENT, "depth": 6, "pooling": 1, "groups": 1, "group": (1, 1, 1, 1), "dense": 1}


@torch.no_grad()
def test_mean_attention_is_softmax_attention_without_queries() -> None:
    torch.manual_seed(0)
    mean, attention = MeanAttention(32), SelfAttention(32, 4)
    mean.v.weight.copy_(attention.qkv.weight[64:])
    mean.v.bias.copy_(attention.qkv.bias[64:])
    mean.proj.load_state_dict(attention.proj.state_dict())
    attention.qkv.weight[:32] = 0
    attention.qkv.bias[:32] = 0
    x, layout = torch.randn(2, 9, 32), Layout((Span("image", 9),), (3, 3))
    expected = attention(x, layout, Context())
    torch.testing.assert_close(mean(x, layout, Context()), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_pooling_to_the_same_side_is_the_identity_and_repeating_undoes_it() -> None:
    x = torch.randn(2, 24, 5)
    assert torch.equal(repeated(x, (4, 6), (4, 6)), x)
    square = torch.randn(2, 16, 5)
    torch.testing.assert_close(pooled(square, (4, 4), 4), square)
    mean = square.unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(pooled(square, (4, 4), 2), mean)
    back = repeated(mean, (2, 2), (4, 4)).unflatten(1, (4, 4))
    assert torch.equal(back[:, 0, 0], back[:, 1, 1])
    assert torch.equal(back[:, 3, 2], mean[:, 3])


@torch.no_grad()
def test_at_the_start_recovery_gives_the_dense_map_back() -> None:
    backbone: Any = TINY["flexdit"].build()
    streams, context = embedded(backbone, *inputs(backbone))
    entered = streams
    for block in backbone.blocks:
        streams, _ = block(streams, context)
        if isinstance(block, MergeBlock):
            assert torch.equal(streams["image"], pooled(entered["image"], (4, 4), 2))
            assert streams["image"].shape == (3, 4, 64)
        if isinstance(block, RecoverBlock):
            assert "full" not in streams.tokens
        if not isinstance(block, Pool) and "full" not in streams.tokens:
            torch.testing.assert_close(streams["image"], entered["image"], rtol=1e-6, atol=1e-6)
    assert streams.layout == entered.layout


@torch.no_grad()
def test_one_set_of_weights_serves_several_densities_and_sizes() -> None:
    backbone: Any = make("flexdit")
    x, t, condition = inputs(backbone)
    outs = []
    for side in (1, 2, 3, 4):
        other = replace(backbone.preset, sides=(side,)).build().eval()
        other.load_state_dict(backbone.state_dict())
        outs.append(other(x, t, condition))
        assert outs[-1].shape == (3, 8, 8, 8)
    assert not torch.allclose(outs[0], outs[1], atol=1e-3)
    assert backbone(torch.randn(3, 4, 6, 10), t, condition).shape == (3, 8, 6, 10)


@torch.no_grad()
def test_the_density_follows_the_noise() -> None:
    config = FlexDiTConfig(**SMALL, classes=10, levels=(0.4, 0.8), sides=(4, 3, 2))
    assert [config.side(t) for t in (0.0, 0.39, 0.4, 0.79, 0.8, 1.0)] == [4, 4, 3, 3, 2, 2]
    assert FlexDiTConfig.from_dict(config.to_dict()) == config
    backbone: Any = config.build()
    x, _, condition = inputs(backbone)
    costs = []
    for level in (0.9, 0.5, 0.1):
        t = torch.full((3,), level, dtype=torch.float64)
        streams, context = embedded(backbone, x, t, condition)
        costs.append(backbone.macs(streams.layout))
        with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(MATH):
            backbone.head(backbone.run(streams, context), context)
        ends = backbone.end_macs(streams.layout)
        assert counter.get_total_flops() // 2 == 3 * (costs[-1] - ends["embed"])
    assert costs[0] < costs[1] < costs[2]
    with pytest.raises(UserError, match=r"one token density; its times ask for \[2, 4\]"):
        backbone(x, torch.tensor([0.9, 0.9, 0.1], dtype=torch.float64), condition)


def test_costs_of_the_published_sizes() -> None:
    """67.6 and 220.1 G are logged: no products of fused attention, but equal weights as a matrix in mean blocks."""
    for name, tokens, means, logged in (("FlexDiT-XL/2", 256, 1, 67.6), ("FlexDiT-XL/2-512", 1024, 2, 220.1)):
        with torch.device("meta"):
            backbone: Any = PRESETS[name].build()
        x, t, condition = backbone.example(1, "meta")
        layout = backbone.embed(x, t, backbone.prepare(condition))[0].layout
        total, width = backbone.macs(layout), 1152
        products = 4 * (2 * 64 * tokens * width * 2 + 3 * 2 * 64 * 64 * width)  # two between densities, three sparse
        products += (4 + backbone.preset.dense) * 2 * tokens**2 * width
        values = means * (2 * (tokens - 1) * width**2 + tokens**2 * width)
        repetition = 4 * (tokens - 64) * width**2  # their first linear runs on the repeated tokens
        assert (total - products + values + repetition) / 1e9 == pytest.approx(logged, abs=0.06)


@torch.no_grad()
def test_a_merging_block_costs_what_the_formula_says() -> None:
    backbone: Any = make("flexdit")
    layout = backbone.blocks[1].after(embedded(backbone, *inputs(backbone))[0].layout)
    m, n, d = 4, 16, 64
    assert (
        sum(backbone.blocks[2].macs(layout).values())
        == d * d * (2 * m + 2 * n) + 2 * m * n * d + 8 * m * d * d + 6 * d * d
    )
    recover = backbone.blocks[4].macs(layout)
    assert recover["attn"] == d * d * (2 * n + 2 * m) + 2 * m * n * d
    assert recover["mlp"] == 8 * n * d * d
    assert recover["rest"] == (n + m) * d * d + 6 * d * d


@torch.no_grad()
def test_made_of_a_dit_it_has_its_weights_in_order() -> None:
    config = DiTConfig(**{**LATENT, "depth": 6}, classes=10)
    dit, generator = config.build(), torch.Generator().manual_seed(1)
    for p in dit.parameters():
        p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    more = {name: SMALL[name] for name in ("pooling", "groups", "group", "dense")}
    flex: Any = from_dit(config, dit.state_dict(), **more, sides=(2,))
    assert kinds(flex.preset) == ["mean", "first", "sparse", "recover", "dense", "dense"]
    blocks = [block for block in flex.blocks if not isinstance(block, Pool)]
    for mine, theirs in zip(blocks, dit.blocks, strict=True):
        assert torch.equal(mine.mlp.fc1.weight, theirs.mlp.fc1.weight)
        assert torch.equal(mine.attn.proj.bias, theirs.attn.proj.bias)
        assert torch.equal(mine.modulation.linear.weight, theirs.modulation.linear.weight)
    q, k, v = dit.blocks[0].attn.qkv.weight.chunk(3)
    assert torch.equal(blocks[0].attn.v.weight, v)
    q, k, v = dit.blocks[1].attn.qkv.weight.chunk(3)
    assert torch.equal(blocks[1].attn.q.weight, q)
    assert torch.equal(blocks[1].attn.kv.weight, torch.cat([k, v]))
    assert torch.equal(blocks[3].from_full.weight, torch.eye(64))
    assert torch.equal(flex.final_layer.linear.weight, dit.final_layer.linear.weight)
    fresh: Any = flex.preset.build()
    grown, same = fresh.grown_from(dit), flex.state_dict()
    assert grown.keys() == same.keys()
    own = ("from_sparse", "from_full")
    assert all(torch.equal(value, same[name]) for name, value in grown.items() if not any(o in name for o in own))
    assert all(torch.equal(value, same[name]) for name, value in fresh.grown_from(flex).items())
    with pytest.raises(UserError, match="made of a 'dit'"):
        from_dit(flex.preset, {})
    with pytest.raises(UserError, match="of 6 blocks is made of a DiT of as many; got 3"):
        flex.grown_from(make("dit"))


def test_says_what_it_cannot_do() -> None:
    for wrong, message in (
        ({"depth": 7}, "are 6, not the depth, 7"),
        ({"group": (1, 1, 2, 0)}, "1 recover"),
        ({"group": (0, 0, 1, 3)}, "to merge or sparse"),
        ({"levels": (0.5,)}, "one side more than levels"),
        ({"attention": "dint"}, "softmax attention between densities"),
    ):
        with pytest.raises(UserError, match=message):
            FlexDiTConfig(**{**SMALL, **wrong})
    backbone: Any = make("flexdit")
    x, t, condition = inputs(backbone)
    with pytest.raises(UserError, match="pools onto 2x2 tokens here; x has 1x4"):
        backbone(torch.zeros(3, 4, 2, 8), t, condition)
    native, memory = backbone.preset.time.native(t), backbone.prepare(condition)
    assert "attend" in backbone.missing
    with pytest.raises(UserError, match="takes no attention rule"):
        MeanAttention(8)(torch.zeros(1, 2, 8), Layout((Span("image", 2),)), Context(rule=rule(Isolate(("image",)))))
    with pytest.raises(UserError, match="no added segments"):
        backbone.embed(x, native, memory, [Segment("more", x)])
