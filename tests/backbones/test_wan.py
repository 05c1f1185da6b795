"""What Wan claims, and a video drawn from noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ditloom.backbones.wan import PRESETS, WanConfig
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Segment
from ditloom.parts.attention import logits
from ditloom.parts.positions import grid_positions, rotary, rotate
from ditloom.parts.video_patches import patchify_video, unpatchify_video
from ditloom.processes import process
from ditloom.samplers import guidance_rule, sampler
from ditloom.samplers.drawing import Drawing
from tests.backbones.tiny import embedded, inputs, make


def axes_of(head: int) -> tuple[int, int, int]:
    return WanConfig(depth=1, width=2 * head, heads=2, hidden=8).axes


@pytest.mark.parametrize("head", [28, 32, 64, 72, 128])
def test_three_axes_fill_every_head(head: int) -> None:
    axes = axes_of(head)
    assert sum(axes) == head
    assert axes[1] == axes[2] <= axes[0]
    assert all(a % 2 == 0 for a in axes)
    assert axes_of(128) == (44, 42, 42)


@torch.no_grad()
def test_logits_hear_only_differences_of_position_along_each_axis() -> None:
    places, axes = grid_positions(2, 3, 4), axes_of(28)
    q, k = torch.randn(2, 24, 4, 28), torch.randn(2, 24, 4, 28)

    def seen(shift: Tensor) -> Tensor:
        table = rotary(places + shift, axes)
        return logits(rotate(q, table), rotate(k, table))

    still = seen(torch.zeros(3))
    for shift in ([5.0, 0, 0], [0, 7.0, 0], [3.0, 11.0, 2.0]):
        torch.testing.assert_close(seen(torch.tensor(shift)), still, rtol=1e-4, atol=1e-5)
    origin = rotary(torch.zeros(24, 3), axes)
    assert torch.equal(rotate(q, origin), q)


def test_one_row_of_one_frame_is_turned_as_a_line() -> None:
    axes = axes_of(28)
    cos, sin = rotary(grid_positions(1, 1, 6), axes)
    line = rotary(torch.arange(6.0)[:, None], axes[2:])
    assert bool((cos[:, : -axes[2]] == 1).all())
    assert torch.equal(cos[:, -axes[2] :], line[0])
    assert torch.equal(sin[:, -axes[2] :], line[1])


def test_tokens_and_costs_at_the_native_size() -> None:
    with torch.device("meta"):
        backbone = PRESETS["Wan2.1-T2V-1.3B"].build()
    x, t, condition = backbone.example(1, "meta")
    streams, _ = backbone.embed(x, t, backbone.prepare(condition))
    n, d = streams.layout.length(), 1536
    assert (n, streams.layout.grid) == (32_760, (21, 30, 52))
    assert backbone.blocks[0].macs(streams.layout)["attn"] == 4 * n * d * d + 2 * n * n * d


def test_patches_go_back_where_they_came_from() -> None:
    x = torch.arange(2 * 3 * 4 * 6 * 8.0).reshape(2, 3, 4, 6, 8)
    tokens = patchify_video(x, (2, 3, 2))  # (channel, frame, row, column) inside a token
    turned = tokens.unflatten(-1, (3, -1)).mT.flatten(-2)  # as a head writes: the channel last
    assert torch.equal(unpatchify_video(turned, (2, 3, 2), (2, 2, 4)), x)


@torch.no_grad()
def test_text_is_filled_up_with_zeros_that_are_attended_to() -> None:
    backbone = make("wan")
    x, t, condition = inputs(backbone)
    assert condition.text is not None
    assert condition.text_mask is not None
    y = backbone(x, t, condition)
    noisy = torch.where(condition.text_mask[..., None], condition.text, torch.randn(condition.text.shape))
    assert torch.equal(backbone(x, t, replace(condition, text=noisy)), y)
    zeros = replace(condition, text=condition.text * condition.text_mask[..., None], text_mask=None)
    assert torch.equal(backbone(x, t, zeros), y)
    row, length = slice(1, 2), int(condition.text_mask[1].sum())
    short = replace(condition.rows(row), text=condition.text[row, :length], text_mask=None)
    torch.testing.assert_close(backbone(x[row], t[row], short), y[row], rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="6 text tokens; got 9"):
        backbone(x, t, replace(condition, text=torch.zeros(3, 9, 32), text_mask=None))


@torch.no_grad()
def test_segments_are_videos_images_or_tokens() -> None:
    backbone = make("wan")
    x, t, condition = inputs(backbone)
    native, memory = backbone.preset.time.native(t), backbone.prepare(condition)
    tokens = torch.randn(3, 5, 80)
    segments = [
        Segment("clip", x, modulation="zero"),
        Segment("picture", x[:, :, 0], positions=grid_positions(4, 4)),
        Segment("words", tokens, modulation="own", time=torch.full((3,), 0.3, dtype=torch.float64)),
    ]
    streams, context = backbone.embed(x, native, memory, segments)
    assert [span.length for span in streams.layout.spans] == [32, 32, 16, 5]
    assert torch.equal(streams.segment("clip"), streams.segment("image"))
    assert torch.equal(streams.segment("picture"), streams.segment("image")[:, :16])
    assert torch.equal(streams.segment("words"), tokens)
    cos, _ = context.rotary["image"]
    assert torch.equal(cos[:32], cos[32:64])
    assert torch.equal(cos[:16], cos[64:80])
    assert bool((cos[80:] == 1).all())
    y = backbone.head(backbone.run(streams, context), context)
    assert y.shape == x.shape
    assert not torch.allclose(y, backbone(x, t, condition), atol=1e-3)


@torch.no_grad()
def test_every_token_hears_every_other() -> None:
    backbone = make("wan")
    x, t, condition = inputs(backbone)
    other = x.clone()
    other[:, :, 1, 3, 3] += 1
    first = [backbone.blocks[0](*embedded(backbone, v, t, condition))[0]["image"] for v in (x, other)]
    assert bool(((first[0] - first[1]).abs().amax(2) > 0).all())


@torch.no_grad()
def test_text_and_image_are_two_softmaxes_added() -> None:
    from ditloom.parts.attention import kernel
    from ditloom.parts.cross_attention import ImageCrossAttention

    cross = ImageCrossAttention(32, 4, 6, qk_norm="rms-full")
    q, tokens = torch.randn(2, 7, 4, 8), torch.randn(2, 9, 32)
    k, v = cross.keys_values(tokens).unbind(2)
    assert k.shape == (2, 9, 4, 8)
    expected = kernel(q, k[:, 3:], v[:, 3:]) + kernel(q, k[:, :3], v[:, :3])
    torch.testing.assert_close(cross.attend(q, k, v, None), expected)
    own = cross.k_norm(cross.kv(tokens[:, 3:]).chunk(2, -1)[0].unflatten(-1, (4, 8)))
    torch.testing.assert_close(k[:, 3:], own)


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match="head dimension 15 is odd"):
        WanConfig(depth=1, width=30, heads=2, hidden=8)
    with pytest.raises(UserError, match="not a multiple of 4 heads"):
        WanConfig(depth=1, width=30, heads=4, hidden=8)
    backbone = make("wan-thick")
    x, t, condition = inputs(backbone)
    with pytest.raises(UserError, match="2x2x2; got 3x4x8, try 2x4x8"):
        backbone(x[:, :, :3], t, condition)


def test_what_an_image_model_needs_is_said() -> None:
    backbone = make("wan-image")
    x, t, condition = inputs(backbone)
    for name, shape in (("image", r"\[batch, tokens, 20\]"), ("given", r"\[batch, 3, frames, height, width\]")):
        rest = {k: v for k, v in condition.extra.items() if k != name}
        with pytest.raises(UserError, match=f"extra={{'{name}': ...}}.* of shape {shape}"):
            backbone(x, t, replace(condition, extra=rest))
    with pytest.raises(UserError, match=r"size \[2, 4, 8\] and the video given beside it \[2, 8, 8\]"):
        backbone(x[..., :4, :], t, condition)


@pytest.mark.parametrize("batched", [True, False])
def test_a_video_is_drawn_under_guidance(batched: bool) -> None:
    """Two Euler steps with classifier-free guidance by the drawing, and by hand."""
    backbone = make("wan")
    path, (_, _, condition) = process(backbone.preset.process), inputs(backbone, batch=2)
    assert condition.text is not None
    empty = replace(condition, text=torch.zeros(2, 1, 32), text_mask=None)
    told = {"cond": condition, "uncond": empty}
    drawing = Drawing(
        backbone, path, sampler("euler"), guidance_rule("cfg:scale=3"), told, seed=1, indices=(4, 7), batched=batched
    )
    steps = list(drawing.walk((4, 2, 8, 8), 2))
    x, times = drawing.prior((4, 2, 8, 8)), [steps[0].t, *(s.t_next for s in steps)]
    with torch.no_grad():
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            level = torch.full((2,), t, dtype=torch.float64)
            cond, uncond = (backbone(x, level, told[name]) for name in ("cond", "uncond"))
            x = x + (t_next - t) * (uncond + 3 * (cond - uncond))
    torch.testing.assert_close(steps[-1].x, x, rtol=1e-4, atol=1e-4)
