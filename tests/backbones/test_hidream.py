"""What is special about HiDream; its experts are tested with their part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ditloom.backbones.hidream import LAYER, PRESETS, HiDreamConfig, hidden
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Segment
from ditloom.contracts.plan import BlockPlan
from ditloom.parts.experts import balance_loss
from tests.backbones.tiny import embedded, inputs, make, of_kind, planned


def test_active_parameters_and_hidden_widths() -> None:
    assert (hidden(4 * 2560), hidden(2 * 2560)) == (6912, 3584)
    with torch.device("meta"):
        backbone: Any = PRESETS["HiDream-I1"].build()
    experts = sum(p.numel() for n, p in backbone.named_parameters() if ".experts." in n)
    assert backbone.learned_parameters() - experts // 2 == 12_009_653_824


@torch.no_grad()
def test_what_stays_of_the_text_has_its_length_after_every_block() -> None:
    """The place of a block's own text is taken by the next block's; the rest goes on."""
    backbone: Any = make("hidream")
    streams, context = embedded(backbone, *inputs(backbone))
    stays = ("text", "llama")
    assert [streams.segment(s).shape[1] for s in (*stays, "layer")] == [6, 5, 5]
    scrambled = streams
    for position, block in enumerate(backbone.blocks):
        given = backbone.handed(position, context)
        streams, _ = block(streams, context, None, given)
        assert sum(streams.segment(s).shape[1] for s in stays) == 11
        at = scrambled.layout.slice("layer")
        stream = scrambled.layout.span("layer").stream
        noise = scrambled[stream].clone()
        noise[:, at] = 9.0
        scrambled, _ = block(scrambled.updated(**{stream: noise}), context, None, given)
        if not block.is_transition:
            for s in ("image", *stays):
                torch.testing.assert_close(scrambled.segment(s), streams.segment(s), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_every_block_reads_the_layer_that_it_names() -> None:
    backbone: Any = make("hidream")
    x, t, condition = inputs(backbone)
    streams, context = embedded(backbone, x, t, condition)
    llama = condition.extra["llama"]
    for n, position in enumerate(of_kind(backbone)):
        expected = backbone.llama_embedders[n](llama[:, backbone.preset.layers[n]])
        torch.testing.assert_close(backbone.handed(position, context)[LAYER], expected)
    torch.testing.assert_close(streams.segment("llama"), expected)  # of the last block
    outs = []
    for state in range(4):
        changed = llama.clone()
        changed[:, state] += 1
        outs.append(backbone(x, t, replace(condition, extra={"llama": changed})))
    y = backbone(x, t, condition)
    assert not any(torch.allclose(out, y, atol=1e-4) for out in outs)


@torch.no_grad()
def test_more_states_than_are_read_may_be_given() -> None:
    backbone: Any = make("hidream")
    x, t, condition = inputs(backbone)
    more = torch.cat([condition.extra["llama"], torch.randn(3, 2, 5, 16)], dim=1)
    assert torch.equal(backbone(x, t, replace(condition, extra={"llama": more})), backbone(x, t, condition))


def test_balance_is_of_image_tokens_first_and_of_all_tokens_later() -> None:
    backbone: Any = make("hidream")
    x, t, condition = inputs(backbone)
    blocks = of_kind(backbone)
    _, kept = planned(backbone, x, t, condition, {i: (BlockPlan(keep=("balance",)), {}) for i in blocks})
    tokens = (16, 16, 32, 32, 32)
    for i, n in zip(blocks, tokens, strict=True):
        shares = kept[i]["balance"][:, 0]
        counts = shares * n * 2
        torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-4)
        assert float(balance_loss(kept[i]["balance"]).detach()) > 0.5


@pytest.mark.parametrize("weights", ["image", "text"])
@torch.no_grad()
def test_a_segment_is_heard_with_the_time_it_asks_for(weights: str) -> None:
    backbone: Any = make("hidream")
    x, t, condition = inputs(backbone, masked=False)
    tokens = x.flip(0) if weights == "image" else torch.randn(3, 2, 96)
    memory, native = backbone.prepare(condition), backbone.preset.time.native(t)
    outs = []
    for more in ({}, {"modulation": "zero"}, {"modulation": "own", "time": torch.zeros(3)}):
        streams, context = backbone.embed(x, native, memory, [Segment("added", tokens, weights=weights, **more)])
        ended = backbone.run(streams, context)
        assert ended.layout == streams.layout
        outs.append(backbone.head(ended, context))
    assert not torch.allclose(outs[1], outs[0], atol=1e-4)
    torch.testing.assert_close(outs[2], outs[1], rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(UserError, match="5 experts per token cannot be chosen among 4"):
        HiDreamConfig(top_k=5)
    with pytest.raises(UserError, match="for each of 47 blocks"):
        HiDreamConfig(depth=15)
    with pytest.raises(UserError, match="head dimension, 64"):
        HiDreamConfig(heads=40)
    backbone = make("hidream")
    x, t, condition = inputs(backbone)
    llama = condition.extra["llama"]
    for extra, message in (
        ({}, "give Condition"),
        ({"llama": llama[:, :3]}, "4 or more states"),
        ({"llama": llama, "llama_mask": torch.ones(3, 4).bool()}, "mask of a language model"),
        ({"llama": llama[:2]}, "3 rows and the language model's text 2"),
    ):
        with pytest.raises(UserError, match=message):
            backbone(x, t, replace(condition, extra=extra))
