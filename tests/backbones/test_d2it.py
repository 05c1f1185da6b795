"""D2iT: coarse regions have one value, fine ones a correction per position; grains of noise and of loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.backbones.d2it import PRESETS, D2iTConfig
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Segment
from ditloom.parts.grains import fine_places, grain_loss, grain_map, grain_noise, over_cells, region_entropy
from ditloom.sites.rules import Isolate, rule
from tests.backbones.portrait import LATENT
from tests.backbones.tiny import TINY, embedded, inputs, make

ALL = D2iTConfig(**{**LATENT, "depth": 2}, refine_width=32, refine_heads=2, classes=10, fine_ratio=1.0)


def randomised(config: Any) -> Any:
    backbone, generator = config.build().eval(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in backbone.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return backbone


def cells(y: Tensor) -> Tensor:
    """[B, C, h, w, 4]: the positions of every region."""
    return y.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)


def is_constant(y: Tensor) -> Tensor:
    """Whether a region has one value in all channels [B, h, w]."""
    c = cells(y)
    return (c == c[..., :1]).all(-1).all(1)


def with_grain(condition: Condition, grain: Tensor) -> Condition:
    return replace(condition, extra={"grain": grain})


@torch.no_grad()
def test_coarse_regions_have_one_value_and_fine_ones_do_not() -> None:
    backbone = randomised(ALL)
    x, t, condition = inputs(backbone)
    none, every = torch.zeros(3, 4, 4, dtype=torch.bool), torch.ones(3, 4, 4, dtype=torch.bool)
    assert is_constant(backbone(x, t, with_grain(condition, none))).all()
    assert not is_constant(backbone(x, t, with_grain(condition, every))).any()
    some = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.4
    assert torch.equal(is_constant(backbone(x, t, with_grain(condition, some))), ~some)


@torch.no_grad()
def test_refinenet_corrects_nothing_at_the_start() -> None:
    """With RefineNet's head at zero the result is the rough prediction: constant in every region, whatever the map."""
    backbone = randomised(ALL)
    backbone.refine_head.linear.weight.zero_()
    backbone.refine_head.linear.bias.zero_()
    x, t, condition = inputs(backbone)
    out = backbone(x, t, condition)
    assert is_constant(out).all()
    streams, context = embedded(backbone, x, t, condition)
    for block in backbone.blocks[:2]:
        streams, _ = block(streams, context)
    rough = backbone.final_layer(streams["image"], context.modulation["image"])
    assert torch.equal(cells(out)[..., 0].flatten(2).mT, rough)


@torch.no_grad()
def test_four_positions_per_fine_region_are_refined_and_no_others() -> None:
    backbone: Any = make("d2it")
    x, t, condition = inputs(backbone)
    grain = condition.extra["grain"]
    assert grain.sum((1, 2)).tolist() == [8, 8, 8]
    streams, context = embedded(backbone, x, t, condition)
    streams = backbone.run(streams, context)
    assert streams["image"].shape == (3, 4 * 8, 32)
    touched = torch.zeros(3, 64).scatter(1, context.shared["places"], 1.0).unflatten(1, (8, 8))
    assert torch.equal(touched.bool(), over_cells(grain, 2))


@torch.no_grad()
def test_a_position_of_an_image_does_not_depend_on_how_many_are_filled_up() -> None:
    """Images with different numbers of fine regions share a batch: each is what it is alone, with as few places."""
    backbone = randomised(ALL)
    tight = replace(ALL, fine_ratio=0.25).build().eval()
    tight.load_state_dict(backbone.state_dict())
    x, t, condition = inputs(backbone)
    grain = torch.zeros(3, 4, 4, dtype=torch.bool)
    grain[0, 0, :3], grain[1, 2, 1] = True, True
    given = with_grain(condition, grain)
    torch.testing.assert_close(backbone(x, t, given), tight(x, t, given), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_grain_of_a_region_is_heard_by_its_neighbours() -> None:
    backbone = randomised(ALL)
    x, t, condition = inputs(backbone)
    grain = torch.zeros(3, 4, 4, dtype=torch.bool)
    plain = backbone(x, t, with_grain(condition, grain))
    grain[:, 1, 1] = True
    assert not torch.allclose(
        backbone(x, t, with_grain(condition, grain))[:, :, 6:, 6:], plain[:, :, 6:, 6:], atol=1e-4
    )


def test_places_are_row_by_row() -> None:
    grain = torch.tensor([[[False, True], [True, False]], [[False, False], [False, True]]])
    chosen, places, real = fine_places(grain, 2, 2)
    assert chosen.tolist() == [[1, 2], [3, 0]]
    assert places.tolist() == [[2, 3, 6, 7, 8, 9, 12, 13], [10, 11, 14, 15, 0, 1, 4, 5]]
    assert real.tolist() == [[True] * 8, [True] * 4 + [False] * 4]


def test_noise_is_one_draw_per_coarse_cell() -> None:
    grain = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    mixed = grain_noise(noise, grain)
    assert torch.equal(is_constant(mixed), ~grain)
    fine = over_cells(grain, 2)[:, None].expand_as(noise)
    assert torch.equal(mixed[fine], noise[fine])
    assert torch.equal(mixed[..., ::2, ::2], noise[..., ::2, ::2])  # of unit variance everywhere


def test_the_loss_counts_a_coarse_cell_once() -> None:
    """Two regions, the first coarse with error 4 everywhere, the second fine with errors 1, 2, 3, 6: mean of 5."""
    errors = torch.tensor([[4.0, 4.0, 1.0, 2.0], [4.0, 4.0, 3.0, 6.0]])[None, None]
    grain = torch.tensor([[[False, True]]])
    assert grain_loss(errors, grain).tolist() == pytest.approx([(4 + 1 + 2 + 3 + 6) / 5])
    doubled = grain_loss(torch.cat([errors, 3 * errors], dim=1), grain)
    assert doubled.tolist() == pytest.approx([2 * (4 + 1 + 2 + 3 + 6) / 5])


def test_texture_is_finer_than_a_plain_surface() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(1, 3, 32, 32)
    images[..., :16, :16] = 2 * torch.rand(16, 16, generator=generator) - 1  # noise
    images[..., 16:, :16] = torch.linspace(-1, 1, 16)  # a ramp
    images[..., :16, 16:] = torch.where(torch.rand(16, 16, generator=generator) < 0.5, -0.5, 0.5)  # two values
    entropy = region_entropy(images, 16)[0]
    assert entropy[0, 0] > entropy[0, 1] > entropy[1, 1]
    assert entropy[1, 0] > entropy[0, 1]
    assert float(entropy[1, 1]) == pytest.approx(float(region_entropy(torch.full((1, 3, 16, 16), 0.0), 16)), abs=1e-5)
    assert grain_map(entropy[None], 0.5).tolist() == [[[True, False], [True, False]]]
    assert not grain_map(entropy[None], 0.0).any()


def test_sizes_are_close_to_the_published_ones() -> None:
    for name, published in (("D2iT-L/2", 467e6), ("D2iT-XL/2", 687e6)):
        with torch.device("meta"):
            assert PRESETS[name].build().learned_parameters() == pytest.approx(published, rel=0.006)


@torch.no_grad()
def test_refinenet_takes_no_rules_and_no_further_keys() -> None:
    backbone: Any = make("d2it")
    streams, context = embedded(backbone, *inputs(backbone))
    for block in backbone.blocks[:3]:
        streams, _ = block(streams, context)
    key = torch.zeros(3, 2, 2, 16)
    with pytest.raises(UserError, match="no further keys"):
        backbone.blocks[3](streams, context, None, {"extra_keys": (key, key)})
    with pytest.raises(UserError, match="no attention rules"):
        backbone.blocks[3](streams, replace(context, rule=rule(Isolate(("image",)))))


def test_says_what_it_cannot_do() -> None:
    with pytest.raises(UserError, match="above 0, up to 1; got 0"):
        replace(ALL, fine_ratio=0.0)
    with pytest.raises(UserError, match="at least 2x2"):
        replace(ALL, patch=1)
    with pytest.raises(UserError, match="in 0..1; got 1.5"):
        grain_map(torch.zeros(1, 2, 2), 1.5)
    backbone: Any = TINY["d2it"].build()
    x, t, condition = inputs(backbone)
    for grain, message in (
        (torch.ones(3, 4, 4), "at most 8 of 16 regions .*the map has 16"),
        (torch.ones(3, 2, 4), r"of shape \[batch, 4, 4\]; got \[3, 2, 4\]"),
        (torch.zeros(2, 4, 4), "x has 3 rows and the grain maps 2"),
    ):
        with pytest.raises(UserError, match=message):
            backbone(x, t, with_grain(condition, grain))
    with pytest.raises(UserError, match="map of its fine regions: give Condition"):
        backbone(x, t, replace(condition, extra={}))
    with pytest.raises(UserError, match="are for 8x8; got 8x12"):
        backbone(torch.zeros(3, 4, 8, 12), t, condition)
    with pytest.raises(UserError, match="no added segments"):
        backbone.embed(x, backbone.preset.time.native(t), backbone.prepare(condition), [Segment("more", x)])
