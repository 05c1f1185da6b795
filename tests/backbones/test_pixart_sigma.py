"""What PixArt-alpha and PixArt-Sigma claim."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ditloom.backbones.pixart_sigma import PixArtConfig
from ditloom.contracts.clock import Schedule
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Segment
from ditloom.parts.adaln_single import AdaLNSingle, ModulationTable
from ditloom.parts.cross_attention import KEPT
from ditloom.parts.kv_compression import KVCompression
from ditloom.parts.modulation import AdaLN
from ditloom.parts.positions import stretched_grid
from ditloom.sites.run import Run
from tests.backbones.tiny import TINY, embedded, inputs, make


@torch.no_grad()
def test_a_fresh_network_does_not_hear_the_caption() -> None:
    backbone: Any = TINY["pixart-sigma"].build()
    x, t, condition = inputs(backbone)
    assert not backbone(x, t, condition).any()
    torch.nn.init.normal_(backbone.final_layer.linear.weight)
    other = replace(condition, text=torch.randn_like(condition.text))  # type: ignore[type-var]
    y = backbone(x, t, condition)
    assert y.any()
    assert torch.equal(backbone(x, t, other), y)


@torch.no_grad()
def test_compressed_keys_start_as_the_norm_of_averages() -> None:
    compression, keys = KVCompression(32, 2), torch.randn(3, 24, 4, 8)
    average = F.avg_pool2d(keys.flatten(2).mT.unflatten(2, (4, 6)), 2).flatten(2).mT
    expected = F.layer_norm(average, (32,)).unflatten(2, (4, 8))
    torch.testing.assert_close(compression(keys, (4, 6)), expected)


def test_costs_of_a_compressed_block() -> None:
    backbone: Any = make("pixart-sigma-compressed")
    layout = embedded(backbone, *inputs(backbone))[0].layout
    n, d = 16, 96
    convolution = 2 * (n // 4) * d * 4  # keys and values, 2 x 2 depthwise
    assert backbone.blocks[1].macs(layout)["attn"] == 4 * d * d * n + 2 * n * (n // 4) * d + convolution
    assert backbone.blocks[0].macs(layout)["attn"] == 4 * d * d * n + 2 * n * n * d


def test_one_modulation_for_all_blocks_saves_parameters() -> None:
    width, depth = 64, 5
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    saved = depth * count(AdaLN(width, 6)) - count(AdaLNSingle(width)) - depth * count(ModulationTable(width))
    assert saved == depth * (6 * width**2 + 6 * width) - (6 * width**2 + 6 * width) - 6 * depth * width


def test_twice_the_grid_at_twice_the_interpolation_keeps_the_corners() -> None:
    small, large = PixArtConfig(**_sizes(16), interpolation=1.0), PixArtConfig(**_sizes(32), interpolation=2.0)
    assert small.span == large.span
    a, b = (
        stretched_grid(n, n, c.span, 32, torch.float64, torch.device("cpu")).unflatten(0, (n, n))
        for c, n in ((small, 8), (large, 16))
    )
    torch.testing.assert_close(a, b[::2, ::2])
    wide = stretched_grid(4, 16, small.span, 32, torch.float64, torch.device("cpu")).unflatten(0, (4, 16))
    torch.testing.assert_close(wide[::2, ::4], a[::4, ::2])  # every aspect ratio is stretched to one range


def _sizes(image_size: int) -> dict[str, Any]:
    return {"depth": 1, "width": 32, "heads": 2, "image_size": image_size}


@torch.no_grad()
def test_masked_tokens_have_no_influence() -> None:
    backbone = make("pixart-sigma")
    x, t, condition = inputs(backbone)
    assert condition.text is not None
    assert condition.text_mask is not None
    noisy = condition.text + 9 * torch.randn(condition.text.shape) * ~condition.text_mask[..., None]
    y = backbone(x, t, condition)
    torch.testing.assert_close(backbone(x, t, replace(condition, text=noisy)), y, rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="without any token"):
        backbone(x, t, replace(condition, text_mask=torch.zeros(3, 6).bool()))


def test_text_keys_are_prepared_once_and_equal_those_of_the_blocks() -> None:
    backbone: Any = make("pixart-sigma")
    x, t, condition = inputs(backbone)
    with torch.no_grad():
        kept = backbone.prepare(condition)
        assert kept.extra[KEPT].shape == (3, 3, 6, 2, 4, 24)  # rows, blocks, tokens, keys and values, heads, features
        y = backbone(x, t, condition)
    assert KEPT not in backbone.prepare(condition).extra  # gradients flow through them inside the blocks
    assert torch.equal(backbone(x, t, condition).detach(), y)


@torch.no_grad()
def test_a_run_projects_the_text_once() -> None:
    backbone: Any = make("pixart-sigma")
    x, _, condition = inputs(backbone)
    schedule = Schedule((1.0, 0.5, 0.0), (999.0, 499.0))
    run = Run(backbone, schedule=schedule, conditions={"cond": condition})
    projected = []
    backbone.blocks[1].cross.kv.register_forward_hook(lambda *args: projected.append(1))
    native = [torch.full((3,), n) for n in schedule.native]
    for step in range(2):
        y = run.predict(x, schedule.clock(step))["cond"]
        memory = backbone.prepare(condition)
        projected.pop()
        streams, context = backbone.embed(x, native[step], memory)
        assert torch.equal(y, backbone.head(backbone.run(streams, context), context))
    assert len(projected) == 1
    layout = streams.layout
    assert run.report.macs == 3 * (2 * (backbone.macs(layout) - _prepared(backbone)) + _prepared(backbone))


def _prepared(backbone: Any) -> int:
    return 6 * 32 * 96 + 6 * 96 * 96 + 3 * 6 * 96 * 2 * 96


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match="blocks 0..2"):
        PixArtConfig(depth=3, width=96, heads=4, compressed=(3,))
    with pytest.raises(UserError, match="multiple of 3"):
        PixArtConfig(depth=3, width=64, heads=4, sized=True)
    with pytest.raises(UserError, match="did you mean 'conv'"):
        PixArtConfig(depth=3, width=96, heads=4, compressed=(1,), kind="conf").build()
    with pytest.raises(UserError, match="norm of queries and keys 'rsm'"):
        PixArtConfig(depth=3, width=96, heads=4, qk_norm="rsm").build()
    backbone = make("pixart-sigma-compressed")
    x, t, condition = inputs(backbone)
    native, memory = backbone.preset.time.native(t), backbone.prepare(condition)
    with pytest.raises(UserError, match="whole grid"):
        backbone.embed(x, native, memory, [Segment("reference", x)])
    with pytest.raises(UserError, match="at least 4x4"):
        backbone(x[..., :2], t, condition)
    sized = make("pixart-sigma-sized")
    with pytest.raises(UserError, match="told sizes"):
        sized(x, t, Condition(text=condition.text))


@torch.no_grad()
def test_segments_stand_on_the_main_grid() -> None:
    """A copy of the picture at its own places is embedded as the picture is; at others it is not."""
    backbone = make("pixart-sigma")
    x, t, condition = inputs(backbone)
    native, memory = backbone.preset.time.native(t), backbone.prepare(condition)
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).flatten(0, 1)
    for positions, same in ((None, True), (places, True), (places + 3, False)):
        streams, _ = backbone.embed(x, native, memory, [Segment("reference", x, positions=positions)])
        pair = streams.segment("reference"), streams.segment("image")
        assert torch.allclose(*pair, atol=1e-6) is same
    assert streams.layout.read("text") == 6
    assert streams.layout.length() == 32
