"""What is special about U-DiT: sub-grids that attend alone, two forms of one feed-forward, three scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ditloom.backbones.u_dit import UDiTConfig, alternating
from ditloom.contracts.backbone import Backbone
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Segment
from ditloom.contracts.streams import Context
from ditloom.parts.downsampled import DownsampledAttention
from ditloom.parts.rep_mlp import RepMLP
from ditloom.sites.compiling import compile_blocks
from ditloom.sites.rules import Isolate, rule
from ditloom.sites.surface import Surface
from tests.backbones.tiny import TINY, embedded, inputs, make

GRID = (8, 12)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return module


def tokens(width: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, GRID[0] * GRID[1], width, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_merged_feed_forward_is_the_sum_of_the_published_branches() -> None:
    mlp = randomised(RepMLP(12, 24))
    assert isinstance(mlp, RepMLP)
    h = F.gelu(mlp.fc1(tokens(12))).transpose(1, 2).unflatten(2, GRID)
    summed = h + sum(branch(h) for branch in mlp.branches)
    expected = mlp.fc2(summed.flatten(2).transpose(1, 2))
    torch.testing.assert_close(mlp(tokens(12), GRID), expected, rtol=1e-5, atol=1e-5)
    merged = mlp.merged()
    for _ in range(2):  # merging again finds the same weights: nothing accumulates
        torch.testing.assert_close(mlp.merged()(tokens(12), GRID), expected, rtol=1e-5, atol=1e-5)
    assert {name: tuple(p.shape) for name, p in merged.named_parameters()} == {
        "fc1.weight": (24, 12),
        "fc1.bias": (24,),
        "conv.weight": (24, 1, 5, 5),
        "conv.bias": (24,),
        "fc2.weight": (12, 24),
        "fc2.bias": (12,),
    }


@torch.no_grad()
def test_a_merged_model_computes_the_same() -> None:
    backbone = make("u-dit")
    args = inputs(backbone)
    merged = backbone.merged()
    assert merged.preset.merged
    torch.testing.assert_close(merged(*args), backbone(*args), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_with_factor_one_it_is_ordinary_cosine_attention() -> None:
    attention = randomised(DownsampledAttention(24, 2, factor=1))
    assert isinstance(attention, DownsampledAttention)
    attention.projections.q_norm.logit_scale.copy_(torch.tensor([[1.0], [9.0]]))  # the second is cut at 100
    table = alternating(*GRID, 1, 12, torch.device("cpu"))
    x = tokens(24)
    z = x + attention.conv(x.transpose(1, 2).unflatten(2, GRID)).flatten(2).transpose(1, 2)
    q, k, v = attention.projections.qkv(z).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
    q, k = (turned(t) for t in (q, k))
    scale = torch.tensor([1.0, 4.6052]).exp()[:, None, None]
    weights = (scale * (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT)).softmax(-1)
    expected = attention.projections.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, GRID, table), expected, rtol=1e-4, atol=3e-5)


def turned(x: Tensor) -> Tensor:
    """Rotary positions by complex numbers: pair 2k turns by the column, pair 2k + 1 by the row, at frequency k."""
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in GRID), indexing="ij")
    frequencies = 10000.0 ** (-4 * torch.arange(3) / 12)
    angles = torch.stack([columns.reshape(-1, 1) * frequencies, rows.reshape(-1, 1) * frequencies], -1).flatten(1)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


@torch.no_grad()
def test_sub_grids_hear_each_other_through_the_convolution_only() -> None:
    attention = randomised(DownsampledAttention(24, 2))
    assert isinstance(attention, DownsampledAttention)
    table = alternating(*GRID, 2, 12, torch.device("cpu"))
    changed = tokens(24)
    changed[:, 2 * GRID[1] + 5] += 1.0  # row 2, column 5: the sub-grid of even rows and odd columns
    own = torch.zeros(GRID, dtype=torch.bool)
    own[0::2, 1::2] = True
    for convolved in (True, False):
        if not convolved:
            attention.conv.weight.zero_()
        difference = (attention(changed, GRID, table) - attention(tokens(24), GRID, table)).abs().amax((0, 2))
        assert bool((difference[own.flatten()] > 1e-6).all())
        assert bool((difference[~own.flatten()] > 1e-6).any()) == convolved
        assert convolved or not difference[~own.flatten()].any()


def test_scales_and_long_skips() -> None:
    backbone = TINY["u-dit"].build()
    streams, _ = embedded(backbone, *inputs(backbone))
    surface = Surface(backbone, streams.layout)
    assert surface.blocks == 10
    grids = [surface.layouts[position].grid for position in surface.flat]
    assert grids == [(16, 16)] * 2 + [(8, 8)] * 2 + [(4, 4)] * 2 + [(8, 8)] * 2 + [(16, 16)] * 2
    assert len(backbone.skips) == 2
    with pytest.raises(UserError, match=r"long skip from block 3 to block 5 .*range\(4,5\) is self-contained"):
        surface.range(3, 5)
    assert surface.range(2, 7).cost > surface.range(4, 5).cost > 0
    assert surface.keeps_layout(surface.range(2, 7))
    assert not surface.keeps_layout(surface.range(0, 10))  # the last stage is twice as wide as the first


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(UserError, match="width 50 must be a multiple of 4 x 4 heads"):
        UDiTConfig(width=50, heads=4)
    with pytest.raises(UserError, match="5 stages"):
        UDiTConfig(width=48, heads=4, depths=(1, 1, 1))
    backbone = make("u-dit")
    x, t, condition = inputs(backbone)
    with pytest.raises(UserError, match="divide, 8; got 12x16, try 8x16"):
        backbone(x[:, :, :12], t, condition)
    memory, native = backbone.prepare(condition), backbone.preset.time.native(t)
    with pytest.raises(UserError, match="takes no segment 'more'.*grid"):
        backbone.embed(x, native, memory, [Segment("more", x)])
    with pytest.raises(UserError, match="one time per image"):
        backbone.embed(x, native[:, None].expand(-1, 256), memory)


def test_what_it_has_not_is_said() -> None:
    backbone = make("u-dit")
    streams, context = embedded(backbone, *inputs(backbone))
    with pytest.raises(UserError, match="takes no attention rule: in U-DiT each of the sub-grids"):
        backbone.run(streams, Context(**{**vars(context), "rule": rule(Isolate(("image",)))}))
    surface = Surface(backbone, streams.layout)
    assert not surface.has_stage("attend", 0)
    assert not surface.has_stage("logits", 0)
    assert surface.has_stage("k_rope", 0)
    for kind in ("cross", "temporal"):
        with pytest.raises(UserError, match="U-DiT"):
            surface.require(kind, "some method")


@pytest.mark.slow
def test_blocks_compile_whole() -> None:
    backbone: Backbone = make("u-dit")
    args = inputs(backbone)
    plain = backbone(*args)
    torch._dynamo.reset()
    compile_blocks(backbone, backend="aot_eager")
    torch.testing.assert_close(backbone(*args), plain, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
