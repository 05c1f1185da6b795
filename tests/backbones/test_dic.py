"""What is special about DiC: convolutions alone, a condition in the middle of the block, sparse long skips."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ditloom.backbones.dic import PRESETS, DiCConfig
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Segment
from ditloom.contracts.method import Tap
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.streams import Context
from ditloom.sites.combine import why_not
from ditloom.sites.compiling import compile_blocks
from ditloom.sites.rules import Isolate, rule
from ditloom.sites.surface import Surface
from tests.backbones.tiny import TINY, embedded, inputs, make, of_kind


@torch.no_grad()
def test_what_moves_by_four_pixels_moves_by_four_pixels() -> None:
    backbone = make("dic-unconditional")
    x, t, condition = inputs(backbone, batch=1)
    wide = torch.zeros(1, 4, 192, 192)  # reach 40: what happens in the middle and at the borders does not meet
    wide[..., 92:100, 92:100] = x
    moved = wide.roll((4, 8), (-2, -1))
    y, z = backbone(wide, t, condition), backbone(moved, t, condition)
    torch.testing.assert_close(z[..., 64:136, 68:140], y[..., 60:132, 60:132], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(z[..., 60:132, 60:132], y[..., 60:132, 60:132], atol=1e-2)


def test_cost_is_linear_in_pixels() -> None:
    costs = []
    for size in (8, 16, 32):
        backbone = replace(TINY["dic"], image_size=size).build()
        layout = embedded(backbone, *inputs(backbone))[0].layout
        fixed = sum(b.modulation.macs(1) for b in backbone.blocks if not b.is_transition)
        fixed += backbone.conditions.macs() + backbone.final_layer.modulation.macs(1)
        costs.append((backbone.macs(layout) - fixed) / size**2)
    assert costs[0] == costs[1] == costs[2]


@pytest.mark.parametrize(("name", "count"), [("DiC-S", 4), ("DiC-B", 4), ("DiC-XL", 6), ("DiC-H", 10)])
def test_sparse_long_skips_are_last_in_first_out(name: str, count: int) -> None:
    with torch.device("meta"):
        backbone = PRESETS[name].build()
    skips = backbone.skips
    assert len(skips) == count
    assert list(skips.values()) == sorted(skips.values(), reverse=True)
    consumers = [i for i in of_kind(backbone) if backbone.blocks[i].skip_linear is not None]
    assert list(skips) == consumers
    with torch.device("meta"):
        streams, _ = embedded(backbone, *backbone.example(1, "meta"))
    surface = Surface(backbone, streams.layout)
    for consumer, source in skips.items():
        assert surface.layouts[consumer].grid == surface.layouts[source + 1].grid


@torch.no_grad()
def test_the_condition_enters_between_the_convolutions() -> None:
    backbone = make("dic")
    x, t, condition = inputs(backbone)
    plan = BlockPlan(keep=("modulated_in", "conv_hidden"))
    streams, context = embedded(backbone, x, t, condition)
    _, kept = backbone.blocks[0](streams, context, plan)
    _, other = backbone.blocks[0](streams, embedded(backbone, x, 0.5 * t, condition)[1], plan)
    assert torch.equal(kept["modulated_in"], other["modulated_in"])
    assert not torch.allclose(kept["conv_hidden"], other["conv_hidden"], atol=1e-3)


@torch.no_grad()
def test_one_label_serves_all_scales() -> None:
    backbone = make("dic")
    memory = backbone.prepare(inputs(backbone)[2])
    label = inputs(backbone)[2].label
    assert memory.vector is not None
    parts = memory.vector.split(backbone.preset.widths, dim=-1)
    for part, table in zip(parts, backbone.conditions.label, strict=True):
        assert torch.equal(part, table(label))


def test_blocks_act_from_the_start_and_the_head_does_not() -> None:
    torch.manual_seed(0)
    backbone = TINY["dic"].build()
    streams, context = embedded(backbone, *inputs(backbone))
    assert not torch.allclose(backbone.blocks[0](streams, context)[0]["image"], streams["image"], atol=1e-2)
    assert not backbone(*inputs(backbone)).any()


def test_its_convolutions_stand_where_attention_does() -> None:
    backbone = make("dic")
    x, t, condition = inputs(backbone)
    streams, context = embedded(backbone, x, t, condition)
    surface = Surface(backbone, streams.layout)
    assert [s.label for s in surface.require("attn", "some cache")] == [f"conv({i})" for i in range(13)]
    with pytest.raises(UserError, match="no feed-forward"):
        surface.require("mlp", "some cache")
    for stage, op in (("attend", "append"), ("logits", "capture")):
        assert "DiC convolves" in why_not(Tap(stage, block=0, op=op), surface)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="takes no attention rule"):
        backbone.run(streams, Context(**{**vars(context), "rule": rule(Isolate(("image",)))}))
    with pytest.raises(UserError, match="takes no segment"):
        backbone.embed(x, backbone.preset.time.native(t), backbone.prepare(condition), [Segment("more", x)])


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(UserError, match="as deep going down as going up"):
        DiCConfig(width=16, depths=(2, 4, 1, 3, 2))
    with pytest.raises(UserError, match="multiples of their groups; got 18"):
        DiCConfig(width=18, depths=(1, 1, 1, 1, 1))
    with pytest.raises(UserError, match="multiples of their groups; got 72"):
        DiCConfig(width=72, depths=(1, 1, 1, 1, 1))
    with pytest.raises(UserError, match="two halvings divide, 4; got 8x6, try 8x4"):
        backbone = make("dic")
        x, t, condition = inputs(backbone)
        backbone(x[..., :6], t, condition)


@pytest.mark.slow
@torch.no_grad()
def test_blocks_compile_whole() -> None:
    backbone = make("dic")
    args = inputs(backbone)
    plain = backbone(*args)
    torch._dynamo.reset()
    compile_blocks(backbone, backend="aot_eager")
    torch.testing.assert_close(backbone(*args), plain, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
