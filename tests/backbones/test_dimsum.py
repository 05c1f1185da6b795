"""What is special about DiMSUM: scans over space and over bands, a fusion without a gate, one block at many places."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from ditloom.backbones.dimsum import PRESETS, DiMSUMBlock, SharedBlock
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Segment
from ditloom.contracts.streams import Context
from ditloom.parts.modulation import AdaLN
from ditloom.parts.patches import zero_
from ditloom.sites.compiling import compile_blocks
from ditloom.sites.rules import Isolate, rule
from ditloom.sites.surface import Surface
from tests.backbones.tiny import TINY, embedded, inputs, make


def test_the_shared_block_is_counted_once_and_called_every_fourth_time() -> None:
    with torch.device("meta"):
        backbone = PRESETS["DiMSUM-L/2"].build()
    places = [i for i, block in enumerate(backbone.blocks) if isinstance(block, SharedBlock)]
    assert places == [4, 9, 14, 19]
    assert all(backbone.blocks[i].inner is backbone.shared for i in places)
    assert all(not list(backbone.blocks[i].parameters()) for i in places)
    own = sum(p.numel() for p in backbone.shared.parameters())
    rest = sum(p.numel() for n, p in backbone.named_parameters() if not n.startswith("shared."))
    assert own + rest == backbone.learned_parameters() == 459_916_304


@torch.no_grad()
def test_a_copy_shares_its_own_block_and_nothing_with_the_original() -> None:
    backbone = make("dimsum")
    args = inputs(backbone)
    y = backbone(*args)
    other = copy.deepcopy(backbone)
    assert other.blocks[2].inner is other.shared is other.blocks[5].inner is not backbone.shared
    for p in other.shared.parameters():
        p.zero_()
    assert torch.equal(backbone(*args), y)
    assert not torch.allclose(other(*args), y, atol=1e-3)


@torch.no_grad()
def test_without_fusion_and_gates_a_block_is_its_norm() -> None:
    backbone = make("dimsum")
    block = backbone.blocks[1]
    zero_(block.fusion.proj, *(m for m in block.modules() if isinstance(m, AdaLN)))
    streams, context = embedded(backbone, *inputs(backbone))
    streams = streams.updated(residual=2 * streams["image"])
    out, _ = block(streams, context)
    torch.testing.assert_close(out["image"], block.norm1(3 * streams["image"]))
    torch.testing.assert_close(out["residual"], 3 * streams["image"])


@torch.no_grad()
def test_without_gates_scans_change_nothing_whatever_their_order() -> None:
    backbone = make("dimsum")
    streams, context = embedded(backbone, *inputs(backbone))
    c, half = context.modulation["image"], streams["image"][..., :24]
    for block in (b for b in backbone.blocks if isinstance(b, DiMSUMBlock)):
        zero_(block.spatial.modulation, block.frequency.modulation)
        assert torch.equal(block.over_space(half, c, (8, 8)), half)
        torch.testing.assert_close(block.over_bands(half, c, (8, 8)), half, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_orders_of_the_spatial_scan_by_depth() -> None:
    """What a scan hears of a change at one token tells its order."""
    backbone = make("dimsum")
    streams, context = embedded(backbone, *inputs(backbone, batch=1))
    c, half = context.modulation["image"], streams["image"][..., :24]
    changed = half.clone()
    changed[:, 8 * 3 + 5] += 1
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    before = {
        0: (rows < 3) | ((rows == 3) & (columns < 5)),
        1: (rows > 3) | ((rows == 3) & (columns > 5)),
        2: (columns < 5) | ((columns == 5) & (rows < 3)),
        3: (columns > 5) | ((columns == 5) & (rows > 3)),
    }
    after = {0: (3, 6), 1: (3, 4), 2: (4, 5), 3: (2, 5)}
    blocks = [b for b in backbone.blocks if isinstance(b, DiMSUMBlock)]
    for index, block in enumerate(blocks):
        difference = (block.over_space(changed, c, (8, 8)) - block.over_space(half, c, (8, 8))).abs().amax((0, 2))
        assert not difference[before[index].flatten()].any(), index
        assert difference.unflatten(0, (8, 8))[after[index]] > 0, index


@torch.no_grad()
def test_the_projection_of_the_initial_state_acts_only_if_asked() -> None:
    released, real = make("dimsum"), make("dimsum-state")
    for backbone, acts in ((released, False), (real, True)):
        args = inputs(backbone)
        y = backbone(*args)
        backbone.blocks[0].spatial.before.weight.add_(1.0)
        assert torch.equal(backbone(*args), y) != acts


def test_starts_as_published() -> None:
    torch.manual_seed(0)
    backbone = TINY["dimsum"].build()
    block = backbone.blocks[0]
    assert not block.modulation.linear.weight.any()
    assert bool(block.spatial.modulation.linear.weight.any())
    assert not block.spatial.modulation.linear.bias.any()
    assert bool(backbone.shared.modulation.linear.weight.any())
    assert torch.equal(backbone.pos_embed[0, 0, :12].detach(), torch.zeros(12))  # sines of place 0
    assert not torch.equal(backbone.pos_embed[0, 1], backbone.pos_embed[0, 0])


def test_its_mixers_stand_where_attention_does() -> None:
    backbone = make("dimsum")
    x, t, condition = inputs(backbone)
    streams, context = embedded(backbone, x, t, condition)
    surface = Surface(backbone, streams.layout)
    labels = [site.label for site in surface.require("attn", "some cache")]
    assert labels == ["mixer(0)", "mixer(1)", "attn(2)", "mixer(3)", "mixer(4)", "attn(5)"]
    assert len(surface.require("mlp", "some cache")) == 6
    with pytest.raises(UserError, match="takes no attention rule"):
        backbone.run(streams, Context(**{**vars(context), "rule": rule(Isolate(("image",)))}))
    with pytest.raises(UserError, match="takes no segment"):
        backbone.embed(x, backbone.preset.time.native(t), backbone.prepare(condition), [Segment("more", x)])


def test_bad_input_is_one_sentence() -> None:
    config = TINY["dimsum"]
    with pytest.raises(UserError, match="grid of multiples of 4 tokens: image_size 12 with patches of 2 gives 6"):
        replace(config, image_size=12)
    with pytest.raises(UserError, match="width 24 is not a multiple of 5 heads"):
        replace(config, fusion_heads=5)
    backbone = make("dimsum")
    x, t, condition = inputs(backbone)
    with pytest.raises(UserError, match="positions of this DiMSUM are for 16x16; got 8x16"):
        backbone(x[:, :, :8], t, condition)


@pytest.mark.slow
@torch.no_grad()
def test_blocks_compile_whole() -> None:
    backbone = make("dimsum")
    args = inputs(backbone)
    plain = backbone(*args)
    torch._dynamo.reset()
    compile_blocks(backbone, backend="aot_eager")
    torch.testing.assert_close(backbone(*args), plain, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
