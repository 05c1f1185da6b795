"""Every stage on every family: what is captured is what is there, and putting it back changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.clock import Clock, Rows, Schedule
from ditloom.contracts.layout import Segment
from ditloom.contracts.method import Handler, Tap
from ditloom.parts.attention import kernel, logits
from ditloom.sites.surface import Surface
from tests.sites import toys
from tests.sites.driving import by_run, follow, same, start
from tests.sites.walkthroughs import Added, Captures

MODELS = {name: toys.make(name) for name in toys.FAMILIES}


def surface_of(model: Backbone) -> Surface:
    streams, _ = model.embed(toys.latent(), torch.zeros(2), model.prepare(toys.condition(model, 2)))
    return Surface(model, streams.layout)


def places(name: str) -> Iterator[tuple[str, str, int, str]]:
    """Every stage of every block of a family, per stream."""
    surface = surface_of(MODELS[name])
    for block in range(surface.blocks):
        stages = ("block_in", "block_out", "skip", *surface.block(block).stages, *surface.block(block).sites)
        for stage in (s for s in stages if surface.has_stage(s, block)):
            for stream in surface.layout.streams:
                yield name, stage, block, stream


PLACES = [place for name in toys.FAMILIES for place in places(name)]
HAS_NO_STREAM = {"attn", "attn_heads", "attn_out", "ff_hidden"}
"""What the last block of an MMDiT has of the image only; its text is just attended to."""


@dataclass
class Returns(Handler):
    """Puts in at a stage what it is told."""

    tap: Tap
    value: Any
    key: str = "returns"

    def taps(self, schedule: Schedule, surface: Surface) -> Sequence[Sequence[Tap]]:
        return [[self.tap]] * schedule.steps

    def provide(self, tap: Tap, clock: Clock, rows: Rows) -> Any:
        return self.value


def once(model: Backbone, handlers: Sequence[Handler], samples: tuple[str, ...] = ("cond", "uncond")) -> Tensor:
    run = start(model, handlers, steps=1, branches=samples)
    with torch.no_grad():
        return torch.cat(list(run.predict(toys.latent(), run.schedule.clock(0)).values()))


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_capture_then_replace_is_the_identity_at_every_stage(name: str) -> None:
    """Bit for bit; and replacing by something else is not, so the stage is really written."""
    model, plain = MODELS[name], once(MODELS[name], [])
    written = 0
    for _, stage, block, stream in places(name):
        if stream == "text" and block == 3 and stage in HAS_NO_STREAM or (stream == "text" and stage == "mlp"):
            continue
        tap = Tap(stage, block, stream=stream)
        captures = Captures([tap])
        assert same(once(model, [captures]), plain), "looking changes nothing"
        if stage == "logits":
            continue
        (value,) = captures.seen[tap]
        replace = Tap(stage, block, "replace", stream=stream)
        assert same(once(model, [Returns(replace, value)]), plain), (stage, block, stream)
        ends_here = stream == "text" and block == 3 and stage in ("block_out", "q_proj", "q_norm", "q_rope")
        assert same(once(model, [Returns(replace, value.flip(0) * 1.5)]), plain) == ends_here, (stage, block, stream)
        written += 1
    assert written >= 60


def test_captures_are_of_the_right_block_and_step() -> None:
    """Compared with hooks on the blocks themselves."""
    model = MODELS["mmdit"]
    seen: list[Tensor] = []
    hook = model.blocks[2].register_forward_hook(lambda _, __, out: seen.append(out[0]["text"]))
    tap = Tap("block_out", 2, stream="text")
    captures = Captures([tap])
    by_run(model, [captures])
    hook.remove()
    assert len(seen) == 6 and all(same(a, b) for a, b in zip(captures.seen[tap], seen, strict=True))


def test_attention_stages_fit_together() -> None:
    """heads = softmax(logits) v, with q and k as they enter the product."""
    taps = [Tap(stage, 1) for stage in ("q_rope", "k_rope", "v_proj", "logits", "attn_heads")]
    captures = Captures(taps)
    once(MODELS["dit"], [captures])
    q, k, v, scores, heads = (captures.seen[tap][0] for tap in taps)
    torch.testing.assert_close(scores, logits(q, k))
    torch.testing.assert_close(heads, kernel(q, k, v).flatten(2), atol=1e-6, rtol=1e-5)
    mixed = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(heads, mixed, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("stage", ["block_in", "block_out", "attn", "k_proj", "v_proj", "logits", "skip"])
@pytest.mark.parametrize("branches", [("cond",), ("uncond",), ("uncond", "cond"), ("weak",)])
def test_captures_of_some_branches(stage: str, branches: tuple[str, ...]) -> None:
    model = MODELS["u-vit"]
    limited, whole = Tap(stage, 1, branches=branches), Tap(stage, 1)
    captures = Captures([limited, whole])
    once(model, [captures])
    (all_rows,) = captures.seen[whole]
    parts = {"cond": all_rows[:2], "uncond": all_rows[2:]}
    expected = [parts[b] for b in branches if b in parts]
    if not expected:
        assert limited not in captures.seen, "no row of it takes part"
        return
    assert same(captures.seen[limited][0], torch.cat(expected))


@pytest.mark.parametrize("op", ["replace", "add", "lerp"])
@pytest.mark.parametrize("stage", ["block_in", "block_out", "mlp", "v_proj", "attn_heads", "skip", "ff_hidden"])
def test_edits_of_some_branches(stage: str, op: Any) -> None:
    """The other rows are those of a run without, bit for bit."""
    model = MODELS["u-vit"]
    seen = Captures([Tap(stage, 1)])
    plain = once(model, [seen])
    value = torch.roll(seen.seen[Tap(stage, 1)][0], 1, dims=1)
    got = once(model, [Returns(Tap(stage, 1, op, number=0.5, branches=("uncond",)), value)])
    everywhere = once(model, [Returns(Tap(stage, 1, op, number=0.5), value)])
    assert same(got[:2], plain[:2])
    assert same(got[2:], everywhere[2:]) and not same(got[2:], plain[2:])


SEGMENTED = ["block_in", "block_out", "attn", "k_proj", "v_proj", "mlp", "ff_hidden", "attn_heads"]


@pytest.mark.parametrize("stage", SEGMENTED)
@pytest.mark.parametrize("name", ["u-vit-text", "dit"])
def test_taps_of_one_segment(name: str, stage: str) -> None:
    """A segment's tokens, captured and changed alone, wherever it lies in its stream."""
    model = MODELS[name]
    segment = "text" if name == "u-vit-text" else "condition"
    more: list[Handler] = [] if name == "u-vit-text" else [Added(toys.latent(), static=False)]
    whole, part = Tap(stage, 1), Tap(stage, 1, segment=segment)
    captures = Captures([whole, part])
    plain = once(model, [captures, *more])
    (everything,), (some,) = captures.seen[whole], captures.seen[part]
    at = slice(1, 7) if name == "u-vit-text" else slice(16, 32)
    assert same(everything[:, at], some) and not same(some, some.flip(1))
    put = Tap(stage, 1, "replace", segment=segment)
    assert same(once(model, [Returns(put, some), *more]), plain)
    changed = Captures([Tap("block_out", 1)], key="after")
    got = once(model, [Returns(put, some.flip(1) * 2), *more, changed])
    expected = Captures([Tap("block_out", 1)], key="after")
    full = everything.clone()
    full[:, at] = some.flip(1) * 2
    assert same(got, once(model, [Returns(Tap(stage, 1, "replace"), full), *more, expected]))
    if stage != "block_out":
        assert same(*(c.seen[Tap("block_out", 1)][0] for c in (changed, expected)))


def test_a_segment_of_another_stream() -> None:
    tap, whole = Tap("block_out", 1, stream="text", segment="text"), Tap("block_out", 1, stream="text")
    captures = Captures([tap, whole])
    once(MODELS["mmdit"], [captures])
    assert same(captures.seen[tap][0], captures.seen[whole][0])


@dataclass
class TwoTexts(Handler):
    """A second prompt as a segment of the text stream."""

    tokens: Tensor
    key: str = "two-texts"

    def segments(self, clock: Clock, rows: Rows) -> Sequence[Segment]:
        return (Segment("second", self.tokens, weights="text"),)


def test_a_segment_added_to_the_text_stream() -> None:
    taps = [Tap("k_proj", 1, stream="text", segment=s) for s in ("text", "second")] + [Tap("k_proj", 1, stream="text")]
    captures = Captures(taps)
    once(MODELS["mmdit"], [TwoTexts(torch.randn(1, 5, 64)), captures])
    first, second, whole = (captures.seen[tap][0] for tap in taps)
    assert same(torch.cat([first, second], 1), whole) and second.shape == (4, 5, 4, 16)


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_the_time_embedding(name: str) -> None:
    tap = Tap("time_embedding")
    captures = Captures([tap])
    run = start(MODELS[name], [captures])
    follow(run)
    assert len(captures.seen[tap]) == 6
    time = torch.full((4,), run.schedule.native[3], dtype=torch.float64)
    memory = MODELS[name].prepare(toys.condition(MODELS[name], 4))
    _, context = MODELS[name].embed(torch.cat([toys.latent()] * 2), time, memory)
    assert context.time is not None and same(captures.seen[tap][3], context.time)


@dataclass
class Appends(Handler):
    """Appends given keys and values in one block."""

    pair: tuple[Tensor, Tensor]
    key: str = "appends"

    def taps(self, schedule: Schedule, surface: Surface) -> Sequence[Sequence[Tap]]:
        return [[Tap("attend", 1, "append")]] * schedule.steps

    def provide(self, tap: Tap, clock: Clock, rows: Rows) -> tuple[Tensor, Tensor]:
        return self.pair


def test_appended_keys_and_values() -> None:
    """Every query of the block attends to them as well; a copy of all keys changes nothing."""
    model = MODELS["dit"]
    taps = [Tap(stage, 1) for stage in ("q_rope", "k_rope", "v_proj", "attn_heads")]
    captures = Captures(taps)
    plain = once(model, [captures])
    q, k, v, heads = (captures.seen[tap][0] for tap in taps)
    torch.testing.assert_close(once(model, [Appends((k, v))]), plain, atol=1e-5, rtol=1e-5)
    more = (torch.randn(4, 3, 4, 16), torch.randn(4, 3, 4, 16))
    again = Captures(taps)
    once(model, [Appends(more), again])
    got = again.seen[taps[-1]][0]
    expected = kernel(q, torch.cat([k, more[0]], 1), torch.cat([v, more[1]], 1)).flatten(2)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(got, heads, atol=1e-3)
    twice = [Appends((k, v)), Appends(more, key="more")]
    torch.testing.assert_close(once(model, twice), once(model, twice[::-1]))


@dataclass
class Collects(Handler):
    """Whatever it captured keeps its graph if it asked for it."""

    wanted: Sequence[Tap]
    seen: dict[Tap, Any] = field(default_factory=dict)
    key: str = "collects"

    def taps(self, schedule: Schedule, surface: Surface) -> Sequence[Sequence[Tap]]:
        return [self.wanted] * schedule.steps

    def captured(self, tap: Tap, value: Any, clock: Clock, rows: Rows) -> None:
        self.seen[tap] = value


@pytest.mark.parametrize("stage", ["block_in", "block_out", "mlp", "logits", "k_rope"])
def test_captures_keep_their_graph_only_when_asked(stage: str) -> None:
    taps = [Tap(stage, 1, gradient=True), Tap(stage, 1)]
    handler = Collects(taps)
    run = start(MODELS["dit"], [handler], steps=1)
    run.predict(toys.latent().requires_grad_(), run.schedule.clock(0))
    assert [handler.seen[tap].requires_grad for tap in taps] == [True, False]


def test_a_tap_inside_what_is_reused_sees_nothing() -> None:
    """Captures need computed layers."""
    from tests.sites.walkthroughs import FirstBlockCache

    captures = Captures([Tap("block_out", 3)])
    by_run(MODELS["dit"], [captures, FirstBlockCache(9.0)])
    assert len(captures.seen[Tap("block_out", 3)]) == 1
