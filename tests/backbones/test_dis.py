"""What is special about DiS: a scan in both directions, long skips between mixers' outputs, a cost linear in tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Segment
from ditloom.contracts.method import Tap
from ditloom.contracts.plan import Action, BlockPlan
from ditloom.contracts.streams import Context
from ditloom.sites.combine import why_not
from ditloom.sites.compiling import compile_blocks
from ditloom.sites.rules import Isolate, rule
from ditloom.sites.surface import Surface
from tests.backbones.tiny import TINY, embedded, inputs, make, planned


@torch.no_grad()
def test_skips_that_select_the_hidden_state_are_no_skips() -> None:
    """With linear([h, skip]) = h every block is x += Mamba(RMS x): a plain stack."""
    backbone = make("dis")
    for block in backbone.blocks[3:]:
        block.skip_linear.weight.copy_(torch.cat([torch.eye(40), torch.zeros(40, 40)], dim=1))
        block.skip_linear.bias.zero_()
    streams, context = embedded(backbone, *inputs(backbone))
    x = streams["image"]
    for block in backbone.blocks:
        x = x + block.mixer(block.norm(x))
    torch.testing.assert_close(backbone.run(streams, context)["image"], x, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_long_skip_carries_what_the_mixer_gave_not_the_residual_stream() -> None:
    backbone = make("dis")
    streams, context = embedded(backbone, *inputs(backbone))
    left = {}
    residual = hidden = streams["image"]  # as the official code writes it: a residual, and the last mixer's output
    for i, block in enumerate(backbone.blocks):
        if i in backbone.skips:
            hidden = block.skip_linear(torch.cat([hidden, left[backbone.skips[i]]], dim=-1))
        residual = hidden if i == 0 else residual + hidden
        hidden = block.mixer(block.norm(residual))
        left[i] = hidden
    torch.testing.assert_close(backbone.run(streams, context)["image"], residual + hidden, rtol=1e-5, atol=1e-5)


def test_cost_is_linear_in_tokens() -> None:
    costs = []
    for size in (8, 16, 32):
        backbone = replace(TINY["dis-unconditional"], image_size=size).build()
        layout = embedded(backbone, *inputs(backbone))[0].layout
        costs.append(sum(sum(block.macs(layout).values()) for block in backbone.blocks) / layout.length())
        assert Surface(backbone, layout).per_pair == [{}] * 3
    assert costs[0] == costs[1] == costs[2]


@torch.no_grad()
def test_the_label_is_heard_as_a_token_and_in_the_head() -> None:
    backbone = make("dis")
    x, t, condition = inputs(backbone)
    streams, context = embedded(backbone, x, t, condition)
    assert [s.name for s in streams.layout.spans] == ["label", "time", "image"]
    other = embedded(backbone, x, t, condition.rows([1, 2, 0]))
    y = backbone.head(backbone.run(streams, context), context)
    assert not torch.allclose(backbone.head(backbone.run(other[0], context), context), y, atol=1e-3)
    assert not torch.allclose(backbone.head(backbone.run(streams, context), other[1]), y, atol=1e-3)


@torch.no_grad()
def test_a_segment_is_heard_in_the_sequence() -> None:
    backbone = make("dis")
    x, t, condition = inputs(backbone)
    memory, native = backbone.prepare(condition), backbone.preset.time.native(t)
    streams, context = backbone.embed(x, native, memory, [Segment("reference", x.flip(0))])
    assert streams.layout.length() == 2 + 16 + 16
    y = backbone.head(backbone.run(streams, context), context)
    assert y.shape == (3, 8, 8, 8)
    assert not torch.allclose(y, backbone(x, t, condition), atol=1e-3)
    with pytest.raises(UserError, match="one time per image"):
        backbone.embed(x, native, memory, [Segment("reference", x, modulation="zero")])


def test_its_mixer_stands_where_attention_does() -> None:
    backbone = make("dis")
    streams, context = embedded(backbone, *inputs(backbone))
    surface = Surface(backbone, streams.layout)
    sites = surface.require("attn", "some cache")
    assert [s.label for s in sites] == [f"mixer({i})" for i in range(5)]
    assert all(s.cost == backbone.blocks[0].mixer.macs(18) for s in sites)
    with pytest.raises(UserError, match="no feed-forward"):
        surface.require("mlp", "some cache")
    for stage, reason in (("attend", "no keys"), ("logits", "no attention logits"), ("skip", "tap that block's stage")):
        op = "append" if stage == "attend" else "capture"
        assert reason in why_not(Tap(stage, block=0, op=op), surface)
    with pytest.raises(UserError, match="takes no attention rule"):
        backbone.run(streams, Context(**{**vars(context), "rule": rule(Isolate(("image",)))}))
    with pytest.raises(UserError, match="even"):
        replace(backbone.preset, depth=3)


@torch.no_grad()
def test_reusing_a_mixer_reuses_what_its_skip_carries() -> None:
    backbone = make("dis")
    plain, kept = planned(backbone, *inputs(backbone), {0: (BlockPlan(keep=("mixer",)), {})})
    reuse = {0: (BlockPlan(actions=(("mixer", Action.REUSE),)), {"mixer": kept[0]["mixer"]})}
    assert torch.equal(planned(backbone, *inputs(backbone), reuse)[0], plain)


def test_blocks_compile_whole_and_train() -> None:
    backbone = make("dis-unconditional")
    args = inputs(backbone)
    plain = backbone(*args)
    plain.square().sum().backward()
    expected = [p.grad.clone() for p in backbone.parameters() if p.grad is not None]
    backbone.zero_grad()
    torch._dynamo.reset()
    compile_blocks(backbone, backend="aot_eager")
    y = backbone(*args)
    y.square().sum().backward()
    torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)
    for p, e in zip(backbone.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
