"""What Latte claims, and a video drawn from noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ditloom.backbones.latte import FramePositions, LatteConfig, TemporalLatteBlock, frame_table
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.plan import BlockPlan
from ditloom.parts.attention import attend
from ditloom.parts.axis_attention import SpatialAttention, TemporalAttention
from ditloom.processes import process
from ditloom.samplers import guidance_rule, sampler
from ditloom.samplers.drawing import Drawing
from ditloom.sites.rules import Allow, Causal, Gates, Mask, Rule, Term, rule, settle
from ditloom.sites.visit import visit
from tests.backbones.tiny import embedded, inputs, make

F, P = 3, 16


def moved(backbone: Any, block: int, token: int) -> Tensor:
    """Which tokens [frames, places] a block changes when one token of its input is another."""
    streams, context = embedded(backbone, *inputs(backbone))
    x = streams["image"]
    other = x.clone()
    other[:, token] += torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(0))
    outs = [backbone.blocks[block](streams.updated(image=v), context)[0]["image"] for v in (x, other)]
    return (outs[0] - outs[1]).abs().amax((0, 2)).unflatten(0, (F, P)) > 1e-6


@pytest.mark.parametrize("name", ["latte", "latte-text"])
@torch.no_grad()
def test_spatial_blocks_stay_in_a_frame_and_temporal_ones_at_a_place(name: str) -> None:
    backbone = make(name)
    frame, place = 1, 5
    spatial, temporal = moved(backbone, 0, frame * P + place), moved(backbone, 2, frame * P + place)
    assert torch.equal(spatial, (torch.arange(F) == frame)[:, None].expand(F, P))
    assert torch.equal(temporal, (torch.arange(P) == place)[None].expand(F, P))


@torch.no_grad()
def test_both_together_reach_every_token() -> None:
    backbone = make("latte")
    x, t, condition = inputs(backbone)
    other = x.clone()
    other[:, :, 1, 3, 3] += 1
    assert bool(((backbone(x, t, condition) - backbone(other, t, condition)).abs().amax((0, 1)) > 1e-6).all())


@torch.no_grad()
def test_costs_of_a_pair() -> None:
    backbone: Any = make("latte")
    layout = embedded(backbone, *inputs(backbone))[0].layout
    width, projections = 96, 4 * 96 * 96 * F * P
    spatial, temporal = backbone.blocks[0].macs(layout)["attn"], backbone.blocks[2].macs(layout)["temporal"]
    assert spatial - projections == 2 * width * F * P**2
    assert temporal - projections == 2 * width * P * F**2
    q = torch.zeros(1, F * P, 4, 24)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        attend(q, q, q, layout)
    full = counter.get_total_flops() // 2  # attention among all tokens of all frames
    assert full / (spatial + temporal - 2 * projections) == (F * P) ** 2 / (F * P**2 + P * F**2)


@torch.no_grad()
def test_along_one_frame_a_temporal_block_reads_values_only() -> None:
    backbone: Any = make("latte")
    x, t, condition = inputs(backbone)
    streams, context = embedded(backbone, x[:, :, :1], t, condition)
    block = backbone.blocks[2]
    _, kept = block(streams, context, BlockPlan(keep=("modulated_in", "temporal")))
    values = block.attn.qkv(kept["modulated_in"]).chunk(3, -1)[2]
    torch.testing.assert_close(kept["temporal"], block.attn.proj(values), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["latte", "latte-text"])
@torch.no_grad()
def test_frames_have_an_order_only_through_their_positions(name: str) -> None:
    backbone = make(name)
    x, t, condition = inputs(backbone)
    order = torch.tensor([2, 0, 1])
    assert not torch.allclose(backbone(x[:, :, order], t, condition), backbone(x, t, condition)[:, :, order], atol=1e-3)
    backbone.blocks = torch.nn.ModuleList(Passing() if b.is_transition else b for b in backbone.blocks)
    y = backbone(x, t, condition)
    torch.testing.assert_close(backbone(x[:, :, order], t, condition), y[:, :, order], rtol=1e-5, atol=1e-5)


class Passing(FramePositions):
    """Adds nothing."""

    def forward(self, streams: Any, context: Any, plan: Any = None, given: Any = None) -> Any:
        return streams, {}


@torch.no_grad()
def test_frame_positions_are_added_once_between_the_first_two_blocks() -> None:
    backbone: Any = make("latte")
    assert [b.is_transition for b in backbone.blocks] == [False, True, False, False, False]
    assert [isinstance(b, TemporalLatteBlock) for b in backbone.blocks] == [False, False, True, False, True]
    streams, context = embedded(backbone, *inputs(backbone))
    after = backbone.blocks[1](streams, context)[0]["image"] - streams["image"]
    expected = frame_table(F, 96, torch.float32, torch.device("cpu")).repeat_interleave(P, 0)
    torch.testing.assert_close(after[0], expected)


def layout_and_heads() -> tuple[Any, Any]:
    streams, context = embedded(make("latte"), *inputs(make("latte")))
    return streams.layout, context


@pytest.mark.parametrize("kind", [SpatialAttention, TemporalAttention])
@torch.no_grad()
def test_axis_attention_is_attention_under_a_mask(kind: Any) -> None:
    """And any rule among all tokens is AND-ed with it, weighted sums included."""
    layout, context = layout_and_heads()
    attention = kind(96, 4)
    frame, place = torch.arange(F).repeat_interleave(P), torch.arange(P).repeat(F)
    index = frame if kind is SpatialAttention else place
    group = Given(tuple(map(tuple, (index[:, None] == index).tolist())))
    x = torch.randn(3, F * P, 96)
    q, k, v = attention.heads_of(x, None)
    causal = Causal("image", P) if kind is TemporalAttention else Causal("image", 1)
    for asked in (None, rule(causal), Rule((Term((causal,), 0.25), Term((), 0.75)))):
        settled, gates = settle(asked, layout, {}) if asked else (None, {})
        inside = replace(context, rule=settled, gates=dict(gates))
        out = attention.attend(q, k, v, layout, inside)
        terms = [Term((group, *term.masks), term.weight) for term in (asked.terms if asked else (Term(),))]
        expected = attend(q, k, v, layout, Rule(tuple(terms)))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Given(Mask):
    """A boolean matrix, row by row."""

    rows: tuple[tuple[bool, ...], ...]

    def pair(self, query: str, key: str) -> Allow:
        return Allow.SOME

    def block(self, query: str, key: str, layout: Layout, gates: Gates) -> Tensor:
        return torch.tensor(self.rows)[None]


@pytest.mark.parametrize("kind", [SpatialAttention, TemporalAttention])
@torch.no_grad()
def test_appended_keys_are_seen_in_every_group(kind: Any) -> None:
    """As if every group had one more token: here one that outweighs all others."""
    layout, context = layout_and_heads()
    q, value = torch.ones(2, F * P, 4, 24), torch.randn(2, 1, 4, 24)
    at = visit(None, {"extra_keys": (torch.full((2, 1, 4, 24), 50.0), value)}, layout)
    context = replace(context, rule=None)
    out = kind(96, 4).attend(q, torch.zeros_like(q), torch.randn(2, F * P, 4, 24), layout, context, at)
    torch.testing.assert_close(out, value.flatten(2).expand(-1, F * P, -1))


@torch.no_grad()
def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match="in pairs"):
        LatteConfig(depth=3, width=32, heads=2)
    with pytest.raises(UserError, match="not on both"):
        LatteConfig(depth=2, width=32, heads=2, classes=3, text_width=8)
    backbone = make("latte")
    x, t, condition = inputs(backbone)
    with pytest.raises(UserError, match="frames, height, width.*1x2x2; got 3x8x7, try 3x8x6"):
        backbone(x[..., :7], t, condition)
    with pytest.raises(UserError, match="takes x of shape .*frames"):
        backbone(x[:, :, 0], t, condition)
    native, memory = backbone.preset.time.native(t), backbone.prepare(condition)
    with pytest.raises(UserError, match="one grid of tokens"):
        backbone.embed(x, native, memory, [Segment("reference", x)])


@pytest.mark.parametrize(
    ("name", "noise", "solver"),
    [("latte-unconditional", "linear:predicts=v", "euler"), ("latte-text", LatteConfig.process, "ddim")],
)
def test_a_video_is_drawn(name: str, noise: Any, solver: str) -> None:
    """Two steps by the drawing, and by hand."""
    backbone, path = make(name), process(noise)
    _, _, condition = inputs(backbone, batch=2)
    drawing = Drawing(backbone, path, sampler(solver), guidance_rule("none"), {"cond": condition}, indices=(0, 1))
    steps = list(drawing.walk((4, F, 8, 8), 2))
    assert [s.x.shape for s in steps] == 2 * [torch.Size((2, 4, F, 8, 8))]
    x = drawing.prior((4, F, 8, 8))
    for s in steps:
        with torch.no_grad():
            prediction = backbone(x, torch.full((2,), s.t, dtype=torch.float64), condition)
        torch.testing.assert_close(s.estimate.x0, path.estimate(x, s.t, prediction).x0, rtol=1e-4, atol=1e-4)
        x = s.x
