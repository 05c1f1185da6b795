"""Added segments: kept keys and values are those of running the segment every step, until something changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.contracts.clock import Clock, Rows
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.method import Handler
from ditloom.contracts.plan import Action
from ditloom.sites.rules import Isolate, LocalWindow, Only, Rule, rule
from ditloom.sites.run import Run
from tests.sites import toys
from tests.sites.driving import BOTH, by_run, follow, same, start
from tests.sites.walkthroughs import Broadcast, FirstBlockCache

MODELS = {name: toys.make(name) for name in toys.FAMILIES}
MODULATED = ["dit", "mmdit", "mmdit-dual"]


def image(seed: int = 7, samples: int = 2) -> Tensor:
    return torch.randn(samples, toys.CHANNELS, toys.SIZE, toys.SIZE, generator=torch.Generator().manual_seed(seed))


@dataclass
class Adds(Handler):
    """Adds the segments it holds now, and a rule if it has one."""

    now: list[Segment]
    given: Rule | None = None
    key: str = "adds"

    def segments(self, clock: Clock, rows: Rows) -> Sequence[Segment]:
        return self.now

    def rule(self, layout: Layout, clock: Clock, rows: Rows) -> Any:
        return None if self.given is None else (self.given, {})


def clean(name: str = "condition", seed: int = 7, **more: Any) -> Segment:
    return Segment(name, image(seed), **{"modulation": "zero", "static": True, **more})


def always(segments: Sequence[Segment]) -> list[Handler]:
    """The same segments, not static but isolated: what keeping must equal."""
    running = [replace(s, static=False) for s in segments]
    return [Adds(running, rule(Isolate(tuple(s.name for s in segments))))]


SETS: dict[str, Callable[[], list[Segment]]] = {
    "one": lambda: [clean()],
    "two": lambda: [clean("a", 1), clean("b", 2)],
    "own time": lambda: [clean(modulation="own", time=torch.tensor([0.3, 0.1], dtype=torch.float64))],
    "moved": lambda: [clean(positions=torch.rand(16, 2, dtype=torch.float64) * 9)],
    "small": lambda: [replace(clean(), tokens=image()[:, :, :4])],
}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("what", SETS)
@pytest.mark.parametrize("name", MODULATED)
def test_kept_keys_equal_running_the_segment(name: str, what: str, batched: bool) -> None:
    segments = SETS[what]()
    got, run = by_run(MODELS[name], [Adds(segments)], batched=batched)
    expected, every = by_run(MODELS[name], always(segments), batched=batched)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, by_run(MODELS[name])[0], atol=1e-4)
    tokens = sum(s.tokens.shape[-2] * s.tokens.shape[-1] // 4 for s in segments)
    if name == "mmdit-dual":
        assert run.keys.bytes == 0, "its second attention reads them too, with keys of its own"
        return
    assert run.keys.bytes == 2 * run.blocks * 4 * tokens * 64 * 4
    assert run.report.macs < every.report.macs


def test_a_u_vit_tells_time_by_a_token() -> None:
    """There an isolated segment does not depend on the run's time, and is modulated by nothing."""
    segments = [clean(modulation="t")]
    got, run = by_run(MODELS["u-vit"], [Adds(segments)])
    torch.testing.assert_close(got, by_run(MODELS["u-vit"], always(segments))[0], atol=1e-5, rtol=1e-5)
    assert run.keys.bytes > 0


def test_a_static_segment_that_depends_on_time_is_refused() -> None:
    with pytest.raises(UserError, match="segment 'condition' is static but is modulated by the run's time"):
        by_run(MODELS["dit"], [Adds([clean(modulation="t")])])


def test_a_static_segment_of_the_text_stream() -> None:
    segment = Segment("words", torch.randn(2, 5, 64), modulation="zero", weights="text", static=True)
    got, run = by_run(MODELS["mmdit"], [Adds([segment])])
    torch.testing.assert_close(got, by_run(MODELS["mmdit"], always([segment]))[0], atol=1e-5, rtol=1e-5)
    assert run.keys.bytes == 2 * 4 * 4 * 5 * 64 * 4


def walk(run: Run, change: Callable[[int], None]) -> list[dict[str, Tensor]]:
    return follow(run, before=change)[1]


@dataclass
class Changes:
    """What a test changes before step 3, and how often blocks see the segment's tokens."""

    lengths: list[int] = field(default_factory=list)

    def watch(self, model: Any) -> Any:
        return model.blocks[0].register_forward_pre_hook(lambda _, args: self.lengths.append(args[0]["image"].shape[1]))


def new_image(handler: Adds, run: Run) -> None:
    handler.now = [replace(s, tokens=image(9)) for s in handler.now]


def written_image(handler: Adds, run: Run) -> None:
    handler.now[0].tokens.mul_(0.5)


def other_place(handler: Adds, run: Run) -> None:
    handler.now = [replace(s, positions=torch.arange(32, dtype=torch.float64).view(16, 2) / 5) for s in handler.now]


def other_label(handler: Adds, run: Run) -> None:
    run.conditions = {b: toys.condition(run.backbone, 2, seed=8) for b in BOTH}


def other_weights(handler: Adds, run: Run) -> None:
    with torch.no_grad():
        for p in run.backbone.blocks.parameters():
            p.mul_(1.1)


@pytest.mark.parametrize("change", [new_image, written_image, other_place, other_label, other_weights])
@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_a_change_invalidates_kept_keys(name: str, change: Any) -> None:
    """Computed on the first step and again when something that made them has changed; never stale."""
    results = []
    for keep in (True, False):
        model = toys.make(name)
        segments = [clean()]
        handler = Adds(segments) if keep else always(segments)[0]
        run, watched = start(model, [handler]), Changes()
        hook = watched.watch(model)
        results.append(walk(run, lambda s, h=handler, r=run: change(h, r) if s == 3 else None))  # type: ignore[misc]
        hook.remove()
        assert watched.lengths == ([32, 16, 16, 32, 16, 16] if keep else [32] * 6)
    for kept, every in zip(*results, strict=True):
        for b in BOTH:
            torch.testing.assert_close(kept[b], every[b], atol=1e-5, rtol=1e-5)


def test_a_segment_that_comes_and_goes() -> None:
    handler, watched = Adds([clean()]), Changes()
    run = start(MODELS["dit"], [handler])
    hook = watched.watch(MODELS["dit"])
    held = list(handler.now)
    walk(run, lambda s: setattr(handler, "now", [] if s in (2, 3) else held))
    hook.remove()
    assert watched.lengths == [32, 16, 16, 16, 16, 16]


def test_a_rule_that_hides_a_segment_makes_it_run() -> None:
    """Kept keys are seen by all: where some may not see them, the segment is not kept but run."""
    hides = rule(Only(("text",), ("text", "image")))
    for switched in (0, 3):
        results = []
        for keep in (True, False):
            segments = [clean()]
            second = Adds([], None, "b")
            run = start(MODELS["mmdit"], [*([Adds(segments)] if keep else always(segments)), second])
            watched, given = Changes(), [None] * switched + [hides] * (6 - switched)
            hook = watched.watch(MODELS["mmdit"])
            results.append(walk(run, lambda s, h=second, g=given: setattr(h, "given", g[s])))  # type: ignore[misc]
            hook.remove()
            expected = [32, 16, 16, 32, 32, 32] if switched else [32] * 6
            assert watched.lengths == (expected if keep else [32] * 6)
        for kept, every in zip(*results, strict=True):
            torch.testing.assert_close(kept["cond"], every["cond"], atol=1e-5, rtol=1e-5)


def test_a_rule_that_says_nothing_of_a_segment_leaves_it_kept() -> None:
    segments = [clean()]
    window = Adds([], rule(LocalWindow(1)), "window")
    got, run = by_run(MODELS["dit"], [Adds(segments), window])
    assert run.keys.bytes > 0
    expected, _ = by_run(MODELS["dit"], [*always(segments), window])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", [Broadcast(3), FirstBlockCache(9.0)], ids=["attention", "range"])
def test_caches_around_a_static_segment(cache: Handler) -> None:
    """The layout changes after the first step, so what it stored is not used; then the cache does its work."""
    got, run = by_run(MODELS["mmdit"], [Adds([clean()]), cache])
    assert torch.isfinite(got).all()
    steps = {s for s, _ in run.report.cells}
    assert steps == ({2, 4, 5} if isinstance(cache, Broadcast) else {2, 3, 4, 5})


@pytest.mark.parametrize("cache", [Broadcast(3), FirstBlockCache(9.0)], ids=["attention", "range"])
def test_new_keys_are_computed_even_where_a_cache_would_skip(cache: Handler) -> None:
    handler = Adds([clean()])
    run = start(MODELS["mmdit"], [handler, cache])
    walk(run, lambda s: new_image(handler, run) if s == 5 else None)
    assert 5 not in {s for s, _ in run.report.cells}
    assert run.keys.ready(("condition", "segment(2)"), BOTH, 1, run_marks(run, handler))


def run_marks(run: Run, handler: Adds) -> Any:
    from ditloom.sites.segments import AddedSegments

    rows = Rows(BOTH, 2)
    return AddedSegments(run, [handler], [], run.schedule.clock(5), rows).made_of["condition"]


def test_an_interval_keeps_keys_per_branch() -> None:
    """On cond-only steps the conditional rows' keys are used, and none are computed again."""
    watched, run = Changes(), start(MODELS["mmdit"], [Adds([clean()])])
    hook = watched.watch(MODELS["mmdit"])
    got, _ = follow(run, asked=lambda s: ("cond",) if s in (2, 3) else None)
    hook.remove()
    assert watched.lengths == [32, 16, 16, 16, 16, 16]
    every = start(MODELS["mmdit"], always([clean()]))
    expected, _ = follow(every, asked=lambda s: ("cond",) if s in (2, 3) else None)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_tokens_once_per_sample_or_per_row(samples: int) -> None:
    tokens = image(samples=1)
    given = [replace(clean(), tokens=tokens.expand(samples, -1, -1, -1).clone())]
    got, _ = by_run(MODELS["dit"], [Adds(given)])
    expected, _ = by_run(MODELS["dit"], [Adds([replace(clean(), tokens=tokens.expand(4, -1, -1, -1))])])
    assert same(got, expected)


def test_mistakes_are_named() -> None:
    with pytest.raises(
        UserError, match="segment 'condition' has 3 rows; give 1, one per sample .2., or one per row .4."
    ):
        by_run(MODELS["dit"], [Adds([replace(clean(), tokens=image(samples=3))])])
    with pytest.raises(UserError, match="two segments are named 'condition'"):
        by_run(MODELS["dit"], [Adds([clean()], key="a"), Adds([clean(seed=2)], key="b")])
    with pytest.raises(UserError, match="would hold up to 131 kB; the limit is 131 kB"):
        by_run(MODELS["mmdit"], [Adds([clean()])], memory_limit=131_000)


def test_other_purposes_run_the_segment_and_keep_nothing() -> None:
    run = start(MODELS["dit"], [Adds([clean()])])
    watched = Changes()
    hook = watched.watch(MODELS["dit"])
    clock = run.schedule.clock(0, purpose="optimise")
    x = toys.latent().requires_grad_()
    for _ in range(2):
        out = run.predict(x, clock)["cond"]
    (gradient,) = torch.autograd.grad(out.sum(), x)
    hook.remove()
    assert watched.lengths == [32, 32] and run.keys.bytes == 0 and float(gradient.abs().max()) > 0


def test_equal_time_makes_a_segment_part_of_the_plain_sequence() -> None:
    """Modulated by the run's time and seen by all, a segment is more tokens, whichever way its time is told."""
    run = start(MODELS["dit"], steps=1)
    now = torch.full((4,), float(run.schedule.times[0]), dtype=torch.float64)
    told = [Segment("more", image()), Segment("more", image(), modulation="own", time=now)]
    results = []
    for segment in told:
        results.append(start(MODELS["dit"], [Adds([segment])], steps=1).predict(toys.latent(), run.schedule.clock(0)))
    torch.testing.assert_close(results[0]["cond"], results[1]["cond"], atol=1e-6, rtol=1e-6)


def test_reports_of_kept_keys_count_the_plain_run_as_plain() -> None:
    _, run = by_run(MODELS["dit"], [Adds([clean()]), Broadcast(2)])
    _, plain = by_run(MODELS["dit"])
    assert run.report.full_macs == plain.report.macs
    assert run.report.count("attn", Action.REUSE) > 0
