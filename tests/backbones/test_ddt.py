"""DDT and DiT-DH: a state per token conditions a head that sees the noisy tokens again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ditloom.backbones.ddt import DDTConfig, FirstHeadBlock, HeadBlock
from ditloom.backbones.dit import DiTBlock
from ditloom.backbones.dit_dh import DiTDHConfig
from ditloom.contracts.clock import Schedule
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Segment
from ditloom.contracts.plan import Action
from ditloom.contracts.streams import Context
from ditloom.sites.codecs import DELTA
from ditloom.sites.run import Run
from tests.backbones.tiny import TINY, embedded, inputs, make
from tests.sites.scripted import Planned

NAMES = ("ddt", "dit-dh")


def encoded(backbone: Any, *args: Any) -> Any:
    """What enters the head, and the context."""
    streams, context = embedded(backbone, *args)
    for block in backbone.blocks[: backbone.preset.depth]:
        streams, _ = block(streams, context)
    return streams, context


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_state_equal_for_all_tokens_is_ordinary_adaln(name: str) -> None:
    backbone: Any = make(name)
    streams, context = encoded(backbone, *inputs(backbone))
    entered, _ = backbone.blocks[2](streams.map(lambda s: s[:, :1].expand(-1, 16, -1)), context)
    block, one = backbone.blocks[3], entered["state"][:, :1]
    plain = DiTBlock.forward(block, entered, Context(modulation={"image": one}, rotary=_head(context)))
    torch.testing.assert_close(block(entered, context)[0]["image"], plain[0]["image"], rtol=1e-5, atol=1e-5)


def _head(context: Any) -> Any:
    return {"image": context.rotary["head"]}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_head_hears_the_state_where_it_is(name: str) -> None:
    """Changing the state of one token changes that token before any attention of the head: through modulation."""
    backbone: Any = make(name)
    streams, context = encoded(backbone, *inputs(backbone))
    state = streams["image"].clone()
    state[:, 5] += 1
    first = backbone.blocks[2]
    change = first.modulated_in(streams.updated(image=state), context) - first.modulated_in(streams, context)
    assert [i for i in range(16) if bool(change[:, i].any())] == [5]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_run_may_keep_the_state_and_the_head_reads_the_fresh_x(name: str) -> None:
    """Encoder shared between two steps: what the head computes is by hand from the old state and the new x and t."""
    backbone: Any = make(name)
    x, _, condition = inputs(backbone)
    t = torch.tensor([1.0, 0.6, 0.0], dtype=torch.float64)
    schedule = Schedule(tuple(t.tolist()), tuple(backbone.preset.time.native(t).tolist()))
    keep = Planned({"range(0,2)": [Action.COMPUTE, Action.REUSE]})
    run = Run(backbone, [keep], schedule=schedule, conditions={"cond": condition})
    run.predict(x, schedule.clock(0))
    found = run.predict(-x, schedule.clock(1))["cond"]
    memory, rows = backbone.prepare(condition), torch.ones(3, dtype=torch.float64)
    streams, context = backbone.embed(x, schedule.native[0] * rows, memory)
    for block in backbone.blocks[:2]:
        streams, _ = block(streams, context)
    _, context = backbone.embed(-x, schedule.native[1] * rows, memory)
    for block in backbone.blocks[2:]:
        streams, _ = block(streams, context)
    torch.testing.assert_close(found, backbone.head(streams, context), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_change_across_the_border_cannot_be_stored() -> None:
    backbone = make("ddt")
    x, _, condition = inputs(backbone)
    schedule = Schedule((1.0, 0.5, 0.0), (0.0, 0.5, 1.0))
    across = Planned({"range(1,3)": [Action.COMPUTE, Action.REUSE]}, codec=DELTA)
    with pytest.raises(UserError, match="laid out differently at both ends"):
        Run(backbone, [across], schedule=schedule, conditions={"cond": condition}).predict(x, schedule.clock(0))


@torch.no_grad()
def test_which_blocks_start_as_identities() -> None:
    """Of DiT-DH all that keep their stream; of DDT none."""
    for name, identity in (("dit-dh", True), ("ddt", False)):
        backbone: Any = TINY[name].build()
        streams, context = embedded(backbone, *inputs(backbone))
        out, _ = backbone.blocks[0](streams, context)
        assert torch.equal(out["image"], streams["image"]) is identity
        for block in backbone.blocks[:2]:
            streams, _ = block(streams, context)
        entered, _ = backbone.blocks[2](streams, context)
        assert torch.equal(entered["image"], context.shared["noisy"]) is identity
        out, _ = backbone.blocks[3](entered, context)
        assert torch.equal(out["image"], entered["image"]) is identity


@torch.no_grad()
def test_positions_of_a_ddt_span_one_extent_whatever_the_grid() -> None:
    backbone: Any = make("ddt")
    x, t, condition = inputs(backbone)
    small, _ = backbone.embed(x, t, backbone.prepare(condition))[1].rotary["image"]
    large, _ = backbone.embed(torch.zeros(3, 4, 14, 14), t, backbone.prepare(condition))[1].rotary["image"]
    # corners of 4x4 and of 7x7 tokens stand at the same place, and so does every second token
    torch.testing.assert_close(small.unflatten(0, (4, 4)), large.unflatten(0, (7, 7))[::2, ::2])


@torch.no_grad()
def test_frequencies_stay_exact_in_half_precision() -> None:
    backbone: Any = make("dit-dh")
    exact = backbone.t_embedder.W.clone()
    embedder = backbone.to(torch.bfloat16).t_embedder
    assert torch.equal(embedder.W, exact)
    assert embedder(torch.tensor([0.5])).dtype is torch.bfloat16
    assert embedder.to("meta").W.is_meta


def test_block_kinds_and_what_they_refuse() -> None:
    blocks = make("dit-dh").blocks
    assert [isinstance(b, HeadBlock) for b in blocks] == [False, False, True, True]
    assert isinstance(blocks[2], FirstHeadBlock)
    with pytest.raises(UserError, match="a block each"):
        DDTConfig(depth=0, head_depth=2, width=64, heads=4)
    with pytest.raises(UserError, match="multiple of 4"):
        DDTConfig(depth=1, head_depth=1, width=60, heads=6).build()
    with pytest.raises(UserError, match="multiple of 4"):
        DiTDHConfig(depth=1, width=64, heads=4, head_width=60, head_heads=6).build()
    backbone = make("dit-dh")
    x, t, condition = inputs(backbone)
    with pytest.raises(UserError, match="give an image, not tokens"):
        backbone.embed(x, t, backbone.prepare(condition), [Segment("more", torch.zeros(3, 2, 96))])


def test_one_sample_of_more_channels_than_the_width_is_overfitted_by_the_wide_head_alone() -> None:
    """A linear floor: D < n keeps the directions a narrow network cannot write; a wide head writes them all.

    Trained: the output layers alone of either network, by least squares, to a target of rank n over the tokens.
    """
    floor = {}
    for width in (16, 64):
        config = DiTDHConfig(
            depth=1, width=16, heads=2, head_width=width, head_heads=2, head_depth=1, channels=32, image_size=8
        )
        backbone: Any = config.build()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in backbone.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
            x = torch.randn(1, 32, 8, 8, generator=generator)
            target = torch.randn(64, 32, generator=generator)
            streams, context = backbone.embed(x, torch.tensor([0.5]), backbone.prepare(_label()))
            out = backbone.run(streams, context)
            features = torch.cat([backbone.final_layer.norm(out["image"])[0], torch.ones(64, 1)], dim=1).double()
            fitted = features @ torch.linalg.lstsq(features, target.double()).solution
        floor[width] = float((fitted - target).square().mean() / target.var())
    assert floor[16] > 0.6
    assert floor[64] < 0.05


def _label() -> Condition:
    return Condition(label=torch.tensor([3]))
