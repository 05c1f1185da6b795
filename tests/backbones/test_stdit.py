"""What STDiT claims: a video model that begins as an image model, frames that are given, and a video drawn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.backbones.pixart_sigma import PixArtConfig
from ditloom.backbones.stdit import STDiTConfig, TemporalSTDiT3Block, frame_rotary, scaled_frames
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Segment
from ditloom.parts.adaln_single import HEAD
from ditloom.processes import process
from ditloom.samplers import guidance_rule, sampler
from ditloom.samplers.drawing import Drawing
from tests.backbones.tiny import embedded, inputs, make

F, P = 3, 16
IMAGE = {"depth": 3, "width": 96, "heads": 4, "image_size": 8, "channels": 4, "text_width": 32, "text_tokens": 6}


def image_model(video: Any, config: PixArtConfig, blocks: list[Any]) -> Any:
    """The PixArt with the weights of a video model's blocks within frames."""
    image: Any = config.build().eval()
    state = {k: v for k, v in video.state_dict().items() if not k.startswith(("blocks", "fps_embedder"))}
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].squeeze(2)
    for i, block in enumerate(blocks):
        own = {k: v for k, v in block.state_dict().items() if not k.startswith("attn_time")}
        state.update({f"blocks.{i}.{k}": v for k, v in own.items()})
    image.load_state_dict(state)
    return image


def frame_by_frame(image: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    told = replace(condition, extra={})
    return torch.stack([image(x[:, :, f], t, told) for f in range(x.shape[2])], dim=2)


@torch.no_grad()
def test_without_its_attention_along_time_it_is_a_pixart_frame_by_frame() -> None:
    video: Any = make("stdit")
    for block in video.blocks:
        torch.nn.init.zeros_(block.attn_time.proj.weight)
        torch.nn.init.zeros_(block.attn_time.proj.bias)
    x, t, condition = inputs(video)
    image = image_model(video, PixArtConfig(**IMAGE, interpolation=0.5), list(video.blocks))
    expected = frame_by_frame(image, x, t, condition)
    torch.testing.assert_close(video(x, t, condition), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_fresh_blocks_along_time_change_nothing() -> None:
    """STDiT3 begins as the image model whose blocks it took over: a PixArt with normed queries and keys."""
    config = STDiTConfig(depth=6, trained=64, width=96, heads=4, size=(F, 8, 8), text_width=32, text_tokens=6)
    video: Any = config.build().eval()
    streams, context = embedded(video, *inputs(video))
    for i, block in enumerate(video.blocks):
        out = block(streams, context)[0]["image"]
        assert torch.equal(out, streams["image"]) is isinstance(block, TemporalSTDiT3Block), i
    x, t, condition = inputs(video)
    image = image_model(video, PixArtConfig(**IMAGE, qk_norm="rms"), list(video.blocks)[::2])
    level = image.preset.time.noise_level(config.time.native(t))  # the same native time
    expected = -frame_by_frame(image, x, level, condition)[:, :4]  # what was learned points to the data, ours to noise
    torch.testing.assert_close(video(x, t, condition), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["stdit", "stdit-3"])
@torch.no_grad()
def test_a_frame_that_is_given_is_modulated_as_at_time_zero(name: str) -> None:
    backbone: Any = make(name)
    x, t, condition = inputs(backbone)
    levels = t[:, None].repeat(1, F * P)
    levels[:, P : 2 * P] = 0
    context = embedded(backbone, x, levels, condition)[1]
    clean = embedded(backbone, x, torch.zeros_like(t), condition)[1]
    noisy = embedded(backbone, x, t, condition)[1]
    for key in ("image", HEAD):
        frames = context.modulation[key].unflatten(1, (F, P))
        torch.testing.assert_close(frames[:, 1, :1], clean.modulation[key], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(frames[:, 2, 3:4], noisy.modulation[key], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_only_the_first_block_is_told_the_order_of_frames() -> None:
    backbone: Any = make("stdit")
    streams, _ = embedded(backbone, *inputs(backbone))
    x, layout = streams["image"], streams.layout
    told = backbone.blocks[0].timed(x, layout) - x
    table = scaled_frames(F, 2.0, 96, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(told[0], table.repeat_interleave(P, 0), rtol=1e-4, atol=1e-5)
    assert backbone.blocks[1].timed(x, layout) is x


def test_rotary_positions_tell_the_frame_alone() -> None:
    cos, sin = frame_rotary(3, 2, 2, 8, torch.device("cpu"))
    assert torch.equal(cos.unflatten(0, (3, 4)), cos.unflatten(0, (3, 4))[:, :1].expand(-1, 4, -1))
    angles = 2 * 10000.0 ** (-torch.arange(0, 8, 2) / 8).repeat_interleave(2)
    torch.testing.assert_close(cos[8], angles.cos())
    torch.testing.assert_close(sin[8], angles.sin())


def test_every_aspect_ratio_stands_in_a_square() -> None:
    backbone: Any = make("stdit-3")
    for grid, size, expected in (
        ((3, 4, 4), (8, 8), (0.75, 0.75)),  # 64 pixels of 48 trained: closer together
        ((3, 2, 8), (4, 16), (1.5, 0.375)),
    ):
        assert backbone.spacing(grid, torch.zeros(1, 4, 3, *size)) == pytest.approx(expected)


def test_costs_name_both_attentions_of_a_block() -> None:
    backbone: Any = make("stdit")
    layout = embedded(backbone, *inputs(backbone))[0].layout
    costs, projections = backbone.blocks[1].macs(layout), 4 * 96 * 96 * F * P
    assert costs["attn"] == projections + 2 * 96 * F * P**2
    assert costs["temporal"] == projections + 2 * 96 * P * F**2


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match="versions 1 and 3; got 2"):
        STDiTConfig(version=2, depth=2, width=32, heads=2)
    with pytest.raises(UserError, match="in pairs"):
        STDiTConfig(depth=3, width=32, heads=2)
    with pytest.raises(UserError, match="must be even"):
        STDiTConfig(depth=2, width=30, heads=2)
    backbone = make("stdit-3")
    x, t, condition = inputs(backbone)
    with pytest.raises(UserError, match="frames per second"):
        backbone(x, t, replace(condition, extra={}))
    native, memory = backbone.preset.time.native(t), backbone.prepare(condition)
    with pytest.raises(UserError, match="one grid of tokens"):
        backbone.embed(x, native, memory, [Segment("reference", x)])


def test_a_video_is_drawn() -> None:
    """Two Euler steps by the drawing, and by hand; what the release points at is the data."""
    backbone = make("stdit-3")
    path, (_, _, condition) = process(backbone.preset.process), inputs(backbone, batch=2)
    drawing = Drawing(backbone, path, sampler("euler"), guidance_rule("none"), {"cond": condition}, indices=(0, 1))
    steps = list(drawing.walk((4, F, 8, 8), 2))
    x, times = drawing.prior((4, F, 8, 8)), [steps[0].t, *(s.t_next for s in steps)]
    with torch.no_grad():
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            x = x + (t_next - t) * backbone(x, torch.full((2,), t, dtype=torch.float64), condition)
    torch.testing.assert_close(steps[-1].x, x, rtol=1e-4, atol=1e-4)
