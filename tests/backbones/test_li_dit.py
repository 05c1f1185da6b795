"""What is special about LI-DiT; its refiner is tested with its part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ditloom.backbones.li_dit import LiDiTConfig
from ditloom.backbones.mmdit import MMDiTConfig
from ditloom.contracts.errors import UserError
from tests.backbones.tiny import TINY, embedded, inputs, make


def as_mmdit(backbone: Any) -> Any:
    """The MMDiT that is left without the refiner."""
    mine = vars(backbone.preset)
    twin: Any = MMDiTConfig(**{k: v for k, v in mine.items() if k not in ("more_widths", "refiner_depth")}).build()
    twin.load_state_dict({k: v for k, v in backbone.state_dict().items() if not k.startswith("refiner.")})
    return twin.eval()


@torch.no_grad()
def test_with_closed_gates_the_refiner_is_the_plain_projection() -> None:
    backbone: Any = make("li-dit")
    args = inputs(backbone)
    plain = as_mmdit(backbone)(*args)
    assert not torch.allclose(backbone(*args), plain, atol=1e-3)
    for layer in backbone.refiner.layers:
        for p in layer[0].modulation.parameters():
            p.zero_()
    assert torch.equal(backbone(*args), plain)


def test_a_fresh_refiner_changes_nothing() -> None:
    backbone: Any = TINY["li-dit-two"].build()
    x, t, condition = inputs(backbone)
    memory = backbone.prepare(condition)
    streams, _ = embedded(backbone, x, t, condition)
    assert torch.equal(streams.segment("text"), memory.text)
    assert torch.equal(streams.segment("text_2"), memory.extra["text_2"])


@torch.no_grad()
def test_the_refined_text_follows_time() -> None:
    backbone: Any = make("li-dit")
    x, t, condition = inputs(backbone)
    now, later = (embedded(backbone, x, time, condition)[0].segment("text") for time in (t, t / 2))
    assert not torch.allclose(now, later, atol=1e-3)


@torch.no_grad()
def test_a_language_model_may_be_left_out_and_is_heard_where_it_is_not() -> None:
    backbone: Any = make("li-dit-two")
    x, t, condition = inputs(backbone)
    y = backbone(x, t, condition)
    alone = backbone(x, t, replace(condition, extra={}))
    assert alone.shape == y.shape
    assert not torch.allclose(alone, y, atol=1e-3)
    layout = embedded(backbone, x, t, condition)[0].layout
    assert [s.name for s in layout.of("text")] == ["text", "text_2"]


@torch.no_grad()
def test_masked_text_may_hold_anything_in_every_branch() -> None:
    backbone: Any = make("li-dit-two")
    x, t, condition = inputs(backbone)
    mask = torch.arange(6)[None] < torch.tensor([6, 3, 1])[:, None]
    extra = {**condition.extra, "text_2_mask": mask}
    outs = []
    for noise in (0.0, 9.0):
        text = condition.text.masked_fill(~condition.text_mask[..., None], noise)
        text_2 = condition.extra["text_2"].masked_fill(~mask[..., None], noise)
        outs.append(backbone(x, t, replace(condition, text=text, extra={**extra, "text_2": text_2})))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(UserError, match="pooled_width cannot be 0"):
        LiDiTConfig(depth=2, width=64, heads=4, pooled_width=0)
    with pytest.raises(UserError, match="not a multiple of 5 heads"):
        LiDiTConfig(depth=2, width=64, heads=5)
    backbone = make("li-dit-two")
    x, t, condition = inputs(backbone)
    text = condition.extra["text_2"]
    for extra, message in (
        ({"text_2": text[..., :3]}, "LI-DiT as text_2 takes text"),
        ({"text_3": text}, "no place for 'text_3'"),
        ({"text_2": text, "text_2_mask": torch.zeros(3, 6).bool()}, "without any token"),
        ({"text_2": text[:2]}, "3 rows and the text_2 2"),
    ):
        with pytest.raises(UserError, match=message):
            backbone(x, t, replace(condition, extra=extra))
