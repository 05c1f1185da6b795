"""What is special about FLUX."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.backbones.dit import DiTBlock
from ditloom.backbones.flux import FluxConfig, FluxSingleBlock
from ditloom.backbones.mmdit import MMDiTBlock
from ditloom.contracts.clock import Clock, Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment, Span
from ditloom.contracts.method import Probe
from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site
from ditloom.contracts.streams import Context, Streams
from ditloom.parts.modulation import AdaLN
from ditloom.parts.norms import LayerNorm
from ditloom.parts.patches import patchify, unpack
from ditloom.parts.positions import rotary
from ditloom.parts.single_stream import JOINT, JoinStreams, PartStreams, joined_modulation, joined_rotary
from ditloom.sites.codecs import DELTA
from ditloom.sites.rules import Isolate, both, rule, settle
from ditloom.sites.run import Run
from ditloom.sites.surface import Surface
from tests.backbones.tiny import TINY, embedded, inputs, make
from tests.sites.scripted import Planned

LAYOUT = Layout((Span("text", 3, "text"), Span("image", 4, "image")), (2, 2))


def randomise(module: Any, std: float = 0.2) -> Any:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(std * torch.randn(p.shape, generator=g))
    return module.eval()


@torch.no_grad()
def test_a_double_block_with_equal_sides_is_one_block_on_the_concatenation() -> None:
    block = randomise(MMDiTBlock(48, 2, qk_norm="rms"))
    block.text.load_state_dict(block.image.state_dict())
    plain = DiTBlock(48, 2, qk_norm="rms", norms=(LayerNorm(48), LayerNorm(48)), modulation=AdaLN(48, 6))
    plain.load_state_dict({k.removeprefix("image."): v for k, v in block.state_dict().items() if k.startswith("image")})
    x, c = torch.randn(2, 7, 48), torch.randn(2, 1, 48)
    streams = Streams({"text": x[:, :3], "image": x[:, 3:]}, LAYOUT)
    out, _ = block(streams, Context(modulation={"text": c, "image": c}))
    alone = Layout((Span("all", 7),))
    expected, _ = plain(Streams({"image": x}, alone), Context(modulation={"image": c}))
    joined = torch.cat([out["text"], out["image"]], dim=1)
    torch.testing.assert_close(joined, expected["image"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_single_block_is_the_published_fused_form() -> None:
    """linear1 gives q, k, v and the hidden layer at once; linear2 reads attention and hidden layer side by side."""
    block = randomise(FluxSingleBlock(48, 2))
    x, c = torch.randn(2, 7, 48), torch.randn(2, 1, 48)
    table = rotary(torch.randn(7, 3), (4, 8, 12))
    layout = JoinStreams().after(LAYOUT)
    out, _ = block(Streams({"image": x}, layout), Context(modulation={JOINT: c}, rotary={JOINT: table}))

    linear1 = (
        torch.cat([block.attn.qkv.weight, block.mlp.fc1.weight]),
        torch.cat([block.attn.qkv.bias, block.mlp.fc1.bias]),
    )
    linear2 = torch.cat([block.attn.proj.weight, block.mlp.fc2.weight], dim=1), block.attn.proj.bias
    shift, scale, gate = torch.nn.functional.linear(
        torch.nn.functional.silu(c), block.modulation.linear.weight, block.modulation.linear.bias
    ).chunk(3, -1)
    h = (1 + scale) * torch.nn.functional.layer_norm(x, (48,), eps=1e-6) + shift
    qkv, hidden = torch.nn.functional.linear(h, *linear1).split([144, 192], dim=-1)
    q, k, v = qkv.reshape(2, 7, 3, 2, 24).permute(2, 0, 3, 1, 4)
    q, k = (_turned(_rms(t, n.weight), table) for t, n in ((q, block.attn.q_norm), (k, block.attn.k_norm)))
    heads = ((q @ k.mT) / 24**0.5).softmax(-1) @ v
    merged = torch.cat([heads.transpose(1, 2).flatten(2), torch.nn.functional.gelu(hidden, approximate="tanh")], -1)
    expected = x + gate * torch.nn.functional.linear(merged, *linear2)
    torch.testing.assert_close(out["image"], expected, rtol=1e-5, atol=1e-5)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _turned(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotation of pairs by complex numbers."""
    cos, sin = (t[:, ::2] for t in table)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2)


@torch.no_grad()
def test_image_tokens_and_their_positions_permute_together() -> None:
    backbone: Any = make("flux")
    streams, context = embedded(backbone, *inputs(backbone))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    out = backbone.run(streams, context)["image"]
    joint = torch.cat([torch.arange(6), 6 + order])
    tables = {"image": order, JOINT: joint}
    moved = {s: tuple(t[tables[s]] for t in table) for s, table in context.rotary.items()}
    permuted = backbone.run(streams.updated(image=streams["image"][:, order]), replace(context, rotary=moved))["image"]
    torch.testing.assert_close(permuted, out[:, order], rtol=1e-5, atol=1e-5)
    unmoved = backbone.run(streams.updated(image=streams["image"][:, order]), context)["image"]
    assert not torch.allclose(unmoved, out[:, order], atol=1e-3)


@torch.no_grad()
def test_shifted_positions_are_heard_through_the_text_only() -> None:
    """Rotary positions are relative: among image tokens alone a shift of all of them changes nothing."""
    backbone: Any = make("flux")
    x, t, condition = inputs(backbone)
    streams, context = backbone.embed(x, t, backbone.prepare(condition))
    image = rotary(torch.tensor([[0.0, 3, 5]]) + _ids(), TINY["flux"].axes)
    shifted = replace(context, rotary={"image": image, JOINT: joined_rotary({"image": image}, streams.layout)})
    run = lambda c: backbone.head(backbone.run(streams, c), c)  # noqa: E731
    assert not torch.allclose(run(shifted), run(context), atol=1e-4)
    apart = both(context.rule.rule, rule(Isolate(("image", "text"))))
    settled, gates = settle(apart, streams.layout, context.gates)
    alone = [replace(c, rule=settled, gates=dict(gates)) for c in (shifted, context)]
    torch.testing.assert_close(run(alone[0]), run(alone[1]), rtol=1e-4, atol=1e-4)


def _ids() -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    return torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], dim=1)


def test_join_and_part_are_inverse() -> None:
    spans = (
        Span("text", 3, "text"),
        Span("image", 4),
        Span("reference", 2, modulation="zero"),
        Span("more", 1, "text", modulation="own"),
    )
    layout = Layout(spans, (2, 2))
    tokens = {"text": torch.randn(2, 4, 8), "image": torch.randn(2, 6, 8)}
    join, part = JoinStreams(), PartStreams("text", "image")
    joined, _ = join(Streams(tokens, layout), Context())
    assert [s.name for s in joined.layout.spans] == ["text", "more", "image", "reference"]
    assert joined.layout.joint_slice("reference") == layout.joint_slice("reference")
    assert torch.equal(joined.segment("more"), Streams(tokens, layout).segment("more"))
    parted, _ = part(joined, Context())
    assert all(torch.equal(parted[s], tokens[s]) for s in tokens)
    assert [parted.layout.of(s) for s in tokens] == [layout.of(s) for s in tokens]


@pytest.mark.parametrize(("text", "image"), [("t", "t"), ("own", "t"), ("own", "own"), ("zero", "zero")])
def test_the_modulation_of_the_joined_stream_by_group(text: Any, image: Any) -> None:
    """Every token gets the vector it had in its own stream."""
    spans = (Span("text", 3, "text"), Span("more", 2, "text", text), Span("image", 4, "image", image), Span("r", 2))
    layout, joined = Layout(spans), JoinStreams().after(Layout(spans))
    values = {"t": torch.full((1, 1, 1), 1.0), "zero": torch.zeros(1, 1, 1)}
    of = lambda s: torch.cat([values.get(s, torch.tensor([[[2.0]], [[3.0]]])[:1])], 1)  # noqa: E731
    c = {}
    for stream in layout.streams:
        kinds: list[str] = []
        for span in layout.of(stream):
            if not kinds or span.modulation != kinds[-1] or span.modulation == "own":
                kinds.append(span.modulation)
        c[stream] = torch.cat([of(k) for k in kinds], dim=1)
    expected = torch.cat([Context().spread(c[s], layout, s).expand(-1, layout.length(s), -1) for s in c], dim=1)
    together = joined_modulation(c, layout)
    assert together.shape[1] == len(joined.groups("image"))
    spread = Context().spread(together, joined).expand(-1, joined.length("image"), -1)
    assert torch.equal(spread, expected)


@pytest.mark.parametrize("weights", ["image", "text"])
@torch.no_grad()
def test_a_segment_keeps_its_own_time_in_the_single_blocks(weights: str) -> None:
    backbone: Any = make("flux")
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


@torch.no_grad()
def test_positions_of_three_axes_place_a_reference_beside_the_image() -> None:
    """A reference at (1, row, column) is not the same as one at (0, row, column)."""
    backbone: Any = make("flux")
    x, t, condition = inputs(backbone)
    memory, outs = backbone.prepare(condition), []
    for index in (0.0, 1.0):
        places = _ids()
        places[:, 0] = index
        streams, context = backbone.embed(x, t, memory, [Segment("reference", x.flip(0), positions=places)])
        outs.append(backbone.head(backbone.run(streams, context), context))
    assert not torch.allclose(*outs, atol=1e-4)
    plain = backbone.embed(x, t, memory, [Segment("reference", x.flip(0))])
    torch.testing.assert_close(backbone.head(backbone.run(*plain), plain[1]), outs[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="3 position axes"):
        backbone.embed(x, t, memory, [Segment("reference", x, positions=torch.zeros(16, 4))])


def test_guidance_is_told_to_distilled_models_only() -> None:
    x, t, condition = inputs(guided := make("flux-guided"))
    default = replace(condition, extra={"guidance": torch.full((3,), 2.0)})
    assert torch.equal(guided(x, t, replace(condition, extra={})), guided(x, t, default))
    assert not torch.allclose(guided(x, t, condition), guided(x, t, default), atol=1e-3)
    with pytest.raises(UserError, match="no guidance input"):
        make("flux")(x, t, condition)
    with pytest.raises(UserError, match="one scale per image"):
        guided(x, t, replace(condition, extra={"guidance": torch.ones(3, 2)}))


def test_what_does_not_fit_is_said_at_construction() -> None:
    with pytest.raises(UserError, match=r"axes \[16, 56, 56\].*head dimension, 64"):
        FluxConfig(width=3072, heads=48)
    with pytest.raises(UserError, match="not a multiple of 7 heads"):
        FluxConfig(heads=7)


def test_packing_is_the_inverse_of_patches() -> None:
    x = torch.randn(2, 3, 6, 4)
    assert torch.equal(unpack(patchify(x, 2), 2, (3, 2)), x)


def test_where_changes_of_streams_may_be_stored() -> None:
    """Whole stacks and ranges of one kind of block keep their layout; a range into the single blocks does not."""
    backbone = make("flux")
    streams, _ = embedded(backbone, *inputs(backbone))
    surface = Surface(backbone, streams.layout)
    kept = {(i, j): surface.keeps_layout(surface.range(i, j)) for i in range(5) for j in range(i + 1, 6)}
    assert {span for span, keeps in kept.items() if not keeps} == {(i, j) for i in (0, 1) for j in (3, 4)}


@pytest.mark.parametrize(("i", "j"), [(1, 5), (0, 2), (0, 5), (3, 5), (2, 4)])
@torch.no_grad()
def test_a_stored_change_over_a_range_is_what_the_loop_says(i: int, j: int) -> None:
    """Step 1 adds the change of step 0 over blocks i..j-1; across the border, before it, after it and up to the end."""
    backbone: Any = make("flux")
    x, _, condition = inputs(backbone)
    schedule = Schedule((0.9, 0.6, 0.0), (0.9, 0.6), ("cond",))
    handler = Planned({f"range({i},{j})": [Action.COMPUTE, Action.REUSE]}, codec=DELTA)
    run = Run(backbone, [handler], schedule=schedule, conditions={"cond": condition})
    run.predict(x, schedule.clock(0))
    got = run.predict(x, schedule.clock(1))["cond"]

    flat = [*range(2), *range(3, 6)]  # positions of the blocks; 2 joins, 6 parts
    begin, end = flat[i], flat[j - 1] + 1
    end = 7 if i < 2 < j else end
    times = [torch.full((3,), t, dtype=torch.float64) for t in (0.9, 0.6)]
    walks = []
    for time in times:
        streams, context = backbone.embed(x, time, backbone.prepare(condition))
        walk = [streams]
        for block in backbone.blocks:
            walk.append(block(walk[-1], context)[0])
        walks.append((walk, context))
    (first, _), (second, context) = walks
    streams = second[begin].map(lambda now, after, before: now + (after - before), first[end], first[begin])
    for block in backbone.blocks[end:]:
        streams, _ = block(streams, context)
    torch.testing.assert_close(got, backbone.head(streams, context), rtol=1e-5, atol=1e-5)


class Watch(Planned):
    """Looks at the change from the first block to one among the single blocks."""

    def probes(self, site: Site) -> list[Probe]:
        return [Probe("residual", span=(0, 3))]

    def decide(self, site: Site, probes: Any, clock: Clock, ready: bool, memo: dict[str, Any]) -> Action:
        memo["seen"] = next(iter(probes.values()))
        return Action.COMPUTE


@torch.no_grad()
def test_a_residual_across_the_border_is_the_images() -> None:
    backbone: Any = make("flux")
    x, t, condition = inputs(backbone)
    schedule = Schedule((0.9, 0.0), (0.9,), ("cond",))
    handler = Watch({"range(4,5)": [Action.DEFER]})
    run = Run(backbone, [handler], schedule=schedule, conditions={"cond": condition})
    run.predict(x, schedule.clock(0))
    streams, context = backbone.embed(x, torch.full((3,), 0.9, dtype=torch.float64), backbone.prepare(condition))
    later = streams
    for block in backbone.blocks[:4]:
        later, _ = block(later, context)
    expected = later.segment("image") - streams["image"]
    torch.testing.assert_close(run.memo(handler)["seen"], expected, rtol=1e-5, atol=1e-5)


class Reference(Planned):
    """Adds a segment that depends on nothing that changes."""

    segment: Any = None

    def segments(self, clock: Clock, rows: Any) -> list[Segment]:
        return [self.segment]


@pytest.mark.parametrize("weights", ["image", "text"])
@torch.no_grad()
def test_keys_of_a_static_segment_are_kept_in_both_kinds_of_block(weights: str) -> None:
    """The second step attends to what the first one kept, also where text and image have become one stream."""
    backbone: Any = make("flux")
    x, _, condition = inputs(backbone, masked=False)
    tokens = x.flip(0) if weights == "image" else torch.randn(3, 2, 96)
    segment = Segment("reference", tokens, weights=weights, modulation="zero", static=True)
    schedule = Schedule((0.9, 0.6, 0.0), (0.9, 0.6), ("cond",))
    handler = Reference({})
    handler.segment = segment
    run = Run(backbone, [handler], schedule=schedule, conditions={"cond": condition})
    outs = [run.predict(x, schedule.clock(s))["cond"] for s in range(2)]
    assert run.keys.bytes > 0
    for t, out in zip((0.9, 0.6), outs, strict=True):
        time = torch.full((3,), t, dtype=torch.float64)
        streams, context = backbone.embed(x, time, backbone.prepare(condition), [segment])
        settled, gates = settle(rule(Isolate(("reference",))), streams.layout, {})
        context = replace(context, rule=settled, gates=dict(gates))
        expected = backbone.head(backbone.run(streams, context), context)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
