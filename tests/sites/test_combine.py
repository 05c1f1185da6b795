"""Which methods run together: legal sets do what a hand-written loop does, illegal ones are refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.clock import Clock, Rows, Schedule, Window
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Handler, Probe, Tap, mean_change
from ditloom.contracts.plan import Action, BlockPlan
from ditloom.contracts.site import Site
from ditloom.contracts.streams import Context, Streams
from ditloom.sites.codecs import DELTA
from ditloom.sites.surface import Surface
from tests.sites import toys
from tests.sites.driving import by_hand, by_run, follow, loop, same, start
from tests.sites.scripted import Planned
from tests.sites.walkthroughs import Broadcast, Captures, FirstBlockCache, GuidanceGate, HoldOutput, SomeRows

COMPUTE, REUSE, SKIP, ROWS = Action.COMPUTE, Action.REUSE, Action.SKIP, Action.ROWS


def refused(handlers: Sequence[Handler], match: str, name: str = "dit", kind: type[Exception] = UserError) -> None:
    calls: list[int] = []
    model = toys.make(name)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(kind, match=match):
        by_run(model, handlers)
    assert not calls, "refused before anything runs"


def at(label: str, *actions: Action, key: str = "planned") -> Planned:
    return Planned({label: [*actions, *[COMPUTE] * (6 - len(actions))]}, key=key)


def test_two_controllers_of_one_site_are_refused_by_name() -> None:
    sentence = r"^a and b cannot run together: both control attn\(2\) at step 1; give them windows that do not overlap$"
    refused([at("attn(2)", COMPUTE, REUSE, key="a"), at("attn(2)", COMPUTE, REUSE, key="b")], sentence)


@pytest.mark.parametrize(
    "first, second, shared",
    [
        ("range(0,3)", "range(2,5)", r"range\(0,3\) and range\(2,5\), which overlap,"),
        ("range(0,3)", "range(1,2)", r"range\(0,3\) and range\(1,2\), which overlap,"),
        ("range(1,3)", "range(1,3)", r"range\(1,3\)"),
        ("mlp(0)", "mlp(0)", r"mlp\(0\)"),
        ("branch(uncond)", "branch(uncond)", r"branch\(uncond\)"),
        ("output", "branch(uncond)", r"(output and branch|branch\(uncond\) and output).*overlap,"),
    ],
)
def test_one_controller_per_level_and_place(first: str, second: str, shared: str) -> None:
    handlers = [at(first, COMPUTE, COMPUTE, REUSE, key="a"), at(second, COMPUTE, COMPUTE, REUSE, key="b")]
    refused(handlers, f"a and b cannot run together: both control {shared} at step 2")
    refused(handlers[::-1], "a and b cannot run together")


@pytest.mark.parametrize(
    "first, second", [("attn(1)", "mlp(1)"), ("attn(1)", "attn(2)"), ("range(0,2)", "range(2,4)"), ("output", "mlp(0)")]
)
def test_different_places_are_legal(first: str, second: str) -> None:
    both = [at(first, COMPUTE, REUSE, key="a"), at(second, COMPUTE, REUSE, key="b")]
    _, run = by_run(toys.make("dit"), both)
    assert run.report.counts[first, "reuse"] > 0


def test_disjoint_windows_are_legal_and_each_does_its_part() -> None:
    """The second one starts with nothing in store, whatever the first has."""
    model = toys.make("dit")
    early, late = Broadcast(2, Window(0, 3, "index")), Broadcast(3, Window(3, 6, "index"), key="late")
    got, run = by_run(model, [early, late])
    stored: dict[int, Any] = {}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        def call(i: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
            if s in (1, 4, 5):
                return block(streams, context, BlockPlan((("attn", REUSE),)), {"attn": stored[i]})
            streams, kept = block(streams, context, BlockPlan(keep=("attn",)), given)
            stored[i] = kept["attn"]
            return streams, kept

        return loop(model, streams, context, call)

    torch.testing.assert_close(got, by_hand(model, step), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["mmdit", "u-toy", "dit"])
def test_nested_levels_equal_a_double_loop(name: str) -> None:
    """A range decided by its first block, around an attention broadcast: inside a computed range the broadcast acts."""
    model, threshold, state = toys.make(name), 0.3, {"reused": 0}
    last = len(model.blocks)
    attention: dict[int, Any] = {}
    known: dict[str, Any] = {}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        saved: dict[int, Any] = {}

        def through(streams: Streams, first: int, stop: int) -> Streams:
            for p in range(first, stop):
                block = model.blocks[p]
                given: dict[str, Any] = {"skip": saved[model.skips[p]]} if p in model.skips else {}
                if block.is_transition:
                    streams, _ = block(streams, context, None, given)
                elif s % 3 and p in attention:
                    given["attn"] = attention[p]
                    streams, _ = block(streams, context, BlockPlan((("attn", REUSE),)), given)
                else:
                    streams, kept = block(streams, context, BlockPlan(keep=("attn",)), given)
                    attention[p] = kept["attn"]
                saved[p] = streams.tokens
            return streams

        after = through(streams, 0, 1)
        residual = (after["image"] - streams["image"])[:2]
        if known and float(mean_change(residual, known["residual"])) < threshold:
            state["reused"] += 1
            return Streams({k: v + known["delta"][k] for k, v in after.tokens.items()}, after.layout)
        out = through(after, 1, last)
        known.update(residual=residual, delta={k: out.tokens[k] - after.tokens[k] for k in out.tokens})
        return out

    expected = by_hand(model, step)
    assert 0 < state["reused"] < 5
    for order in permutations([FirstBlockCache(threshold), Broadcast(3)]):
        got, run = by_run(model, order)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert run.report.count("range", REUSE) == 2 * state["reused"]


def test_a_predicted_branch_forbids_other_methods_to_approximate_the_rest() -> None:
    """No step is approximated at two nested levels by two methods; what is computed is still stored."""
    model = toys.make("mmdit")
    _, run = by_run(model, [GuidanceGate(2), Broadcast(6)])
    assert run.report.counts["attn(0)", "reuse"] == 2, "step 1 only"
    assert run.report.counts["attn(0)", "compute"] == 2 + 4
    one = Planned({"branch(uncond)": [COMPUTE, COMPUTE, *[REUSE] * 4], "attn(0)": [COMPUTE, *[REUSE] * 5]})
    _, run = by_run(model, [one])
    assert run.report.counts["attn(0)", "reuse"] == 2 + 4, "one method may do both on purpose"


MODEL_HANDLERS: Mapping[str, Callable[[], list[Handler]]] = {
    "caches": lambda: [Broadcast(3), SomeRows(3), FirstBlockCache(0.3), HoldOutput((4,))],
    "taps": lambda: [Writes("b", "add", 1.0), Writes("a", "lerp", 0.5), Writes("c", "replace"), Captures([TAP])],
    "both": lambda: [Writes("b", "add", 1.0), Broadcast(2), GuidanceGate(3), Writes("a", "lerp", 0.5)],
}
TAP = Tap("block_out", 1)


@dataclass
class Writes(Handler):
    """Writes at a stage on every step."""

    key: str
    op: Any = "add"
    number: float = 0.0
    stage: str = "block_out"
    segment: str | None = None
    branches: tuple[str, ...] | None = None

    def taps(self, schedule: Schedule, surface: Surface) -> Sequence[Sequence[Tap]]:
        tap = Tap(self.stage, 1, self.op, number=self.number, segment=self.segment, branches=self.branches)
        return [[tap]] * schedule.steps

    def provide(self, tap: Tap, clock: Clock, rows: Rows) -> Tensor:
        g = torch.Generator().manual_seed(len(self.key) + ord(self.key[0]))
        return torch.randn(1, 16, 64, generator=g).expand(rows.total, -1, -1)


@pytest.mark.parametrize("name", MODEL_HANDLERS)
def test_the_order_of_writing_does_not_matter(name: str) -> None:
    model = toys.make("mmdit")
    make = MODEL_HANDLERS[name]
    orders = list(permutations(range(len(make()))))[:: 5 if len(make()) > 3 else 1]
    results = [by_run(model, [make()[i] for i in order]) for order in orders]
    assert all(same(x, results[0][0]) for x, _ in results)
    assert all([h.key for h in run.handlers] == [h.key for h in results[0][1].handlers] for _, run in results)


def test_replace_then_mix_then_add_whatever_their_names() -> None:
    """Captures see the tensor untouched; a replacement does not undo what others add."""
    model = toys.make("dit")
    captures, writers = Captures([TAP]), [Writes("b", "replace"), Writes("c", "lerp", 0.25), Writes("a", "add")]
    plain, after = Captures([TAP]), Captures([Tap("block_in", 2)], key="after")
    follow(start(model, [plain], steps=1))
    follow(start(model, [captures, *writers, after], steps=1))
    rows = Rows(("cond", "uncond"), 2)
    b, c, a = (w.provide(TAP, None, rows) for w in writers)  # type: ignore[arg-type]
    assert same(captures.seen[TAP][0], plain.seen[TAP][0])
    torch.testing.assert_close(after.seen[Tap("block_in", 2)][0], 0.25 * b + 0.75 * c + a)


@pytest.mark.parametrize("stage", ["block_out", "mlp", "attn_out"])
def test_two_replacements_of_one_stage_are_refused(stage: str) -> None:
    sentence = f"^a and b cannot run together: both replace {stage} of block 1 at step 0$"
    refused([Writes("b", "replace", stage=stage), Writes("a", "replace", stage=stage)], sentence)
    refused([Writes("a", "replace", stage=stage), Writes("b", "copy-rows", stage=stage)], sentence)


def test_a_replacement_of_a_part_conflicts_with_one_of_the_whole() -> None:
    refused([Writes("a", "replace"), Writes("b", "replace", segment="image")], "both replace block_out")


def test_replacements_of_different_branches_are_legal() -> None:
    handlers = [Writes("a", "replace", branches=("cond",)), Writes("b", "replace", branches=("uncond",))]
    by_run(toys.make("dit"), handlers)
    refused([*handlers, Writes("c", "replace", branches=("cond", "weak"))], "a and c cannot run together")


def test_the_same_method_twice_is_refused() -> None:
    refused([Broadcast(2), Broadcast(3)], "^broadcast is given twice; one run can hold a method once$")


REASONS = [
    ("dit", "cross", "broadcast needs the site 'cross': DiT is conditioned through adaLN and has no cross-attention"),
    ("u-vit", "cross", "U-ViT reads text through self-attention"),
    ("mmdit", "temporal", "MMDiT has no temporal attention"),
    ("dit", "nonsense", "dit has no site 'nonsense'"),
]


@pytest.mark.parametrize("name, kind, reason", REASONS)
def test_a_family_says_why_it_lacks_a_site(name: str, kind: str, reason: str) -> None:
    refused([Broadcast(2, kind=kind)], reason, name)


@dataclass
class ByHand(Handler):
    """Controls a site that was made by hand, not asked of the surface."""

    site: Site
    codec: Any = DELTA
    key: str = "by-hand"

    def controls(self, surface: Surface) -> Any:
        from ditloom.contracts.method import Control
        from ditloom.sites.codecs import HOLD

        return [Control(self.site, self.codec, HOLD)]

    def plan(self, schedule: Schedule, surface: Surface) -> Any:
        return [{}, *[{self.site: REUSE}] * (schedule.steps - 1)]


def test_sites_made_by_hand_are_checked_too() -> None:
    from ditloom.contracts.site import block_range
    from ditloom.sites.codecs import VALUE

    refused([ByHand(block_range(1, 5))], "crosses its border", "u-vit")
    refused([ByHand(Site("cross", block=1), VALUE)], "no cross-attention")
    refused([ByHand(Site("mlp", block=3, name="mlp_text"), VALUE)], "which that block lacks", "mmdit")


@pytest.mark.parametrize(
    "stage, block, op, why",
    [
        ("nowhere", 1, "capture", "block 1 of dit has no such stage"),
        ("block_out", 9, "capture", r"there is no block 9, this model has blocks 0\.\.4"),
        ("logits", 1, "replace", "attention logits can only be captured"),
        ("k_rope", 1, "append", "appended at the stage 'attend'"),
        ("attend", 1, "capture", "nothing else happens there"),
        ("block_out", 1, "multiply", "known operations are replace, add, lerp, copy-rows"),
        ("block_out", None, "capture", "a tap needs a block"),
        ("cross", 1, "capture", "no cross-attention"),
        ("skip", 1, "capture", "no long skips"),
    ],
)
def test_impossible_taps_are_refused(stage: str, block: int | None, op: Any, why: str) -> None:
    refused([Captures([Tap(stage, block, op)], key="tapping")], f"tapping cannot {op} {stage}: .*{why}")


def test_a_stream_that_a_stage_lacks_is_named() -> None:
    with pytest.raises(UserError, match="cannot capture attn of block 3: it has no stream 'text'"):
        by_run(toys.make("mmdit"), [Captures([Tap("attn", 3, stream="text")])])


class Longer(Broadcast):
    """Plans a step too many."""

    def plan(self, schedule: Schedule, surface: Surface) -> Any:
        return [{}] * (schedule.steps + 1)


class Uncontrolled(Broadcast):
    """Plans what it does not control."""

    def controls(self, surface: Surface) -> Any:
        return []


class Early(FirstBlockCache):
    """Decides by what is not known yet."""

    def probes(self, site: Site) -> Any:
        return (Probe("block_in", 3),)


MISTAKES = [
    ([Longer(2)], "planned 7 steps of a run with 6"),
    ([Uncontrolled(2)], r"plans attn\(0\) at step 1 without a control"),
    ([Early(1.0)], "is not known there"),
    ([at("attn(0)", ROWS)], r"plans rows at attn\(0\), where that is not possible"),
    ([at("range(0,2)", Action.MIX)], r"plans mix at range\(0,2\)"),
    ([at("output", SKIP)], "plans skip at output"),
]


@pytest.mark.parametrize("handlers, why", MISTAKES)
def test_mistakes_of_a_handler_are_errors_of_its_author(handlers: list[Handler], why: str) -> None:
    refused(handlers, why, kind=ValueError)


def test_a_range_across_a_long_skip_is_refused_with_one_that_is_not() -> None:
    """U-ViT of five blocks: skips 1 -> 3 and 0 -> 4."""
    surface = surface_of(toys.make("u-vit"))
    with pytest.raises(UserError, match=r"from block 0 to block 4 crosses its border; range\(1,4\) is self-contained"):
        surface.range(1, 5)
    legal = {(i, j) for i in range(5) for j in range(i + 1, 6) if is_legal(surface, i, j)}
    assert legal == {(2, 3), (1, 4), (0, 5)}
    assert {(i, j) for i in range(6) for j in range(i + 1, 7) if is_legal(surface_of(toys.make("u-toy")), i, j)} >= {
        (0, 1),
        (1, 4),
        (2, 3),
        (4, 6),
        (0, 6),
    }
    assert not is_legal(surface_of(toys.make("u-toy")), 2, 4)


def surface_of(model: Backbone) -> Surface:
    streams, _ = model.embed(toys.latent(), torch.zeros(2), model.prepare(toys.condition(model, 2)))
    return Surface(model, streams.layout)


def is_legal(surface: Surface, i: int, j: int) -> bool:
    try:
        surface.range(i, j)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("name", ["u-vit", "u-vit-text"])
def test_the_symmetric_range_of_a_u_vit(name: str) -> None:
    """Skip-Cache: the value of what leaves the middle, kept; the outer blocks and their skips run."""
    model = toys.make(name)
    plan = [COMPUTE, REUSE, REUSE, COMPUTE, REUSE, REUSE]
    got, run = by_run(model, [Planned({"range(1,4)": plan})])
    stored: dict[str, Any] = {}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        first, _ = model.blocks[0](streams, context)
        if plan[s] is COMPUTE:
            stored["middle"] = middle(first, context)
        last, _ = model.blocks[4](stored["middle"], context, None, {"skip": first.tokens})
        return last

    def middle(streams: Streams, context: Context) -> Streams:
        one, _ = model.blocks[1](streams, context)
        two, _ = model.blocks[2](one, context)
        return model.blocks[3](two, context, None, {"skip": one.tokens})[0]

    torch.testing.assert_close(got, by_hand(model, step), atol=1e-6, rtol=1e-6)
    assert run.report.counts["range(1,4)", "reuse"] == 8


def test_every_submodule_of_every_block() -> None:
    surface = start(toys.make("mmdit-dual")).surface_of(toys.make("mmdit-dual").embed(*example())[0].layout)
    labels = [site.label for site in surface.submodules]
    assert labels[:4] == ["attn(0)", "attn2(0)", "mlp(0)", "mlp_text(0)"] and labels[-2:] == ["attn(3)", "mlp(3)"]
    assert {site.kind for site in surface.submodules} == {"attn", "mlp"}
    assert surface.sites("mlp") == tuple(s for s in surface.submodules if s.kind == "mlp")


def example() -> tuple[Tensor, Tensor, Any]:
    model = toys.make("mmdit-dual")
    return toys.latent(), torch.zeros(2, dtype=torch.float64), model.prepare(toys.condition(model, 2))
