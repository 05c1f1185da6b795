"""The nine walk-throughs: each handler against a hand-written loop over the blocks, eager and compiled per block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.clock import Window
from ditloom.contracts.condition import Condition
from ditloom.contracts.method import Tap, mean_change
from ditloom.contracts.plan import Action, BlockPlan, Edit
from ditloom.contracts.streams import Context, Streams
from ditloom.sites.compiling import compile_blocks
from ditloom.sites.rules import Isolate, Padding, Rule, Term, rule, settle
from ditloom.sites.run import Run
from tests.sites import toys
from tests.sites.driving import STEPS, by_hand, by_run, loop
from tests.sites.walkthroughs import (
    Added,
    Broadcast,
    Captures,
    FirstBlockCache,
    Inject,
    LearnedGate,
    Regional,
    SomeRows,
)

TRACED = ("dit", "u-toy")


def modes(*names: str, traced: tuple[str, ...] = TRACED) -> Any:
    """Every family eagerly and compiled per block; tracing is slow, so most of it is left to the long checks."""
    compiled = [pytest.param(n, "compiled", marks=() if n in traced else pytest.mark.slow) for n in names]
    return pytest.mark.parametrize("name, mode", [*((n, "eager") for n in names), *compiled])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def prepared(name: str, mode: str) -> Backbone:
    """A toy; compiled means traced per block in full graphs, where a graph break is an error."""
    model = toys.make(name)
    if mode == "compiled":
        compile_blocks(model, backend="eager")
    return model


def subtract(a: Streams, b: Streams) -> dict[str, Tensor]:
    return {k: a.tokens[k] - b.tokens[k] for k in a.tokens}


@modes("mmdit", "u-toy", "dit", traced=("mmdit", "u-toy"))
def test_first_block_cache(name: str, mode: str) -> None:
    """1: a change over a range, reused while the first block's change stays alike."""
    threshold = 0.35
    last = 0
    model = prepared(name, mode)
    state: dict[str, Any] = {"reused": 0}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        before = streams
        after = loop(model, streams, context, last=1)
        residual = (after["image"] - before["image"])[:2]
        if s and float(mean_change(residual, state["residual"])) < threshold:
            state["reused"] += 1
            return Streams({k: v + state["delta"][k] for k, v in after.tokens.items()}, after.layout)
        out = continued(model, before, context, after)
        state.update(residual=residual, delta=subtract(out, after))
        return out

    expected = by_hand(model, step)
    got, run = by_run(model, [FirstBlockCache(threshold, last=last)])
    assert 0 < state["reused"] < STEPS - 1, "the threshold must divide the steps"
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert run.report.count("range", Action.REUSE) == 2 * state["reused"]


def continued(model: Backbone, before: Streams, context: Context, after: Streams) -> Streams:
    """The blocks after the first, with skips of the whole stack."""
    saved: dict[int, Any] = {0: after.tokens}
    streams = after
    for p, block in enumerate(model.blocks):
        if p == 0:
            continue
        given = {"skip": saved[model.skips[p]]} if p in model.skips else {}
        streams, _ = block(streams, context, None, given)
        saved[p] = streams.tokens
    return streams


@modes(*toys.NAMES, traced=("mmdit", "u-vit"))
def test_attention_broadcast(name: str, mode: str) -> None:
    """2: attention outputs before the gate, reused inside a window, whatever the block's kind."""
    model = prepared(name, mode)
    every, window = 3, Window(1, 5, "index")
    stored: dict[int, Any] = {}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        reuse = s % every and window.contains(toys.schedule(model, STEPS).clock(s))

        def call(i: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
            if reuse:
                return block(streams, context, BlockPlan((("attn", Action.REUSE),)), {**given, "attn": stored[i]})
            streams, kept = block(streams, context, BlockPlan(keep=("attn",)), given)
            stored[i] = kept["attn"]
            return streams, kept

        return loop(model, streams, context, call)

    expected = by_hand(model, step)
    got, run = by_run(model, [Broadcast(every, window)])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    attentions = sum(len([s for s in b.sites if s == "attn"]) for b in model.blocks)
    assert run.report.count("attn", Action.REUSE) == 2 * 3 * attentions


@modes(*toys.NAMES)
def test_rows_of_the_mlp(name: str, mode: str) -> None:
    """3: some tokens of the MLP computed afresh, the others kept."""
    model = prepared(name, mode)
    stored: dict[int, Tensor] = {}
    index = torch.arange(3).expand(4, -1)

    def step(s: int, streams: Streams, context: Context) -> Streams:
        def call(i: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
            fresh, kept = block(streams, context, BlockPlan(keep=("mlp",)), given)
            if s % 2 == 0:
                stored[i] = kept["mlp"]
                return fresh, kept
            stored[i] = torch.cat([kept["mlp"][:, :3], stored[i][:, 3:]], dim=1)
            return block(streams, context, BlockPlan((("mlp", Action.REUSE),)), {**given, "mlp": stored[i]})

        return loop(model, streams, context, call)

    expected = by_hand(model, step)
    got, run = by_run(model, [SomeRows(index.shape[1])])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert run.report.count("mlp", Action.ROWS) > 0
    assert 0 < run.report.share_saved < 0.5


@modes(*toys.NAMES)
def test_key_value_injection(name: str, mode: str) -> None:
    """4: keys and values of row 0 in the other rows, before the norm; row 0 itself never changes."""
    model = prepared(name, mode)
    blocks = (1, 2)

    def step(s: int, streams: Streams, context: Context) -> Streams:
        def call(i: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
            if i not in blocks:
                return block(streams, context, None, given)
            _, kept = block(streams, context, BlockPlan(keep=("k_proj@image", "v_proj@image")), given)
            rows = tree_map(lambda t: t[:1].expand_as(t), kept)
            edits = tuple(Edit(stage, "replace", stage) for stage in ("k_proj", "v_proj"))
            tensors = {stage: rows[f"{stage}@image"] for stage in ("k_proj", "v_proj")}
            return block(streams, context, BlockPlan(edits=edits), {**given, **tensors})

        return loop(model, streams, context, call)

    got, _ = by_run(model, [Inject(blocks)])
    plain, _ = by_run(model, [])
    torch.testing.assert_close(got, by_hand(model, step), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got[1], plain[1], atol=1e-4)


@modes("mmdit", "dit")
def test_static_segment(name: str, mode: str) -> None:
    """5: a condition segment at time 0; keys and values kept after the first step equal running it every step."""
    model = prepared(name, mode)
    image = torch.randn(4, toys.CHANNELS, toys.SIZE, toys.SIZE, generator=torch.Generator().manual_seed(7))
    got, run = by_run(model, [Added(image)])
    assert run.keys.bytes > 0

    plan, given = toys.schedule(model, STEPS), toys.conditions(model)
    memory = model.prepare(Condition.cat([given["cond"], given["uncond"]]))
    (segment,) = Added(image).segments(plan.clock(0), None)  # type: ignore[arg-type]
    x = toys.latent()
    with torch.no_grad():
        for s in range(STEPS):
            time = torch.full((4,), plan.native[s], dtype=torch.float64)
            streams, context = model.embed(torch.cat([x, x]), time, memory, (segment,))
            isolated = ruled(context, streams, rule(Isolate(("condition",))), {})
            out = model.head(loop(model, streams, isolated), isolated)
            x = x - 0.2 * (out[:2] + out[2:])
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)
    plain, _ = by_run(model, [])
    assert not torch.allclose(got, plain, atol=1e-4)


@modes("mmdit", "dit")
def test_two_attentions_mixed_by_region(name: str, mode: str) -> None:
    """6: gate * attention without some keys + (1 - gate) * plain attention, per query token."""
    model = prepared(name, mode)
    tokens = 16 + (6 if name == "mmdit" else 0)
    keys = 6 if name == "mmdit" else 16
    gate = torch.rand(1, tokens, generator=torch.Generator().manual_seed(3))
    hidden = torch.zeros(1, keys, dtype=torch.bool)
    hidden[:, keys // 2 :] = True
    got, _ = by_run(model, [Regional(gate, hidden)])

    def step(s: int, streams: Streams, context: Context) -> Streams:
        def call(i: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
            seen = {"seen": ~hidden.expand(4, -1)}
            masked_rule = Rule((Term((Padding("text" if name == "mmdit" else "image", "seen"),)),))
            masked = ruled(context, streams, masked_rule, seen)
            heads = [block(streams, c, BlockPlan(keep=keep(streams)), given)[1] for c in (masked, context)]
            mixed = {k: mix_heads(k, heads[0][k], heads[1][k], gate, streams) for k in heads[0]}
            edits = tuple(Edit("attn_heads", "replace", k, stream=k.split("@")[1]) for k in mixed)
            return block(streams, context, BlockPlan(edits=edits), {**given, **mixed})

        return loop(model, streams, context, call)

    torch.testing.assert_close(got, by_hand(model, step), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, by_run(model, [])[0], atol=1e-4)


def ruled(context: Context, streams: Streams, given: Rule, gates: dict[str, Tensor]) -> Context:
    settled, tensors = settle(given, streams.layout, gates)
    return replace(context, rule=settled, gates=dict(tensors))


def keep(streams: Streams) -> tuple[str, ...]:
    return tuple(f"attn_heads@{stream}" for stream in streams.tokens)


def mix_heads(key: str, masked: Tensor, plain: Tensor, gate: Tensor, streams: Streams) -> Tensor:
    g = gate[:, streams.layout.stream_slice(key.split("@")[1]), None]
    return g * masked + (1 - g) * plain


@modes(*toys.NAMES)
def test_captures_with_gradients_under_checkpointing(name: str, mode: str) -> None:
    """7: features and attention logits captured for a loss; checkpointing changes neither values nor gradients."""
    model = prepared(name, mode)
    taps = [Tap("block_out", 1, gradient=True), Tap("logits", 2, gradient=True), Tap("attn_out", 0, gradient=True)]

    def gradients(checkpointing: bool) -> tuple[list[Any], list[Tensor]]:
        model.checkpointing = checkpointing
        model.zero_grad()
        captures = Captures(taps)
        plan = toys.schedule(model, 1, ("cond",))
        run = Run(model, [captures], schedule=plan, conditions={"cond": toys.condition(model, 2)})
        out = run.predict(toys.latent(), plan.clock(0))["cond"]
        seen = [captures.seen[tap][0] for tap in taps]
        assert all(len(v) == 1 for v in captures.seen.values()), "recomputation must not deliver twice"
        (out.square().mean() + sum(v.square().mean() for v in seen)).backward()
        return seen, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, grads = gradients(False)
    again, regrads = gradients(True)
    for a, b in zip([*plain, *grads], [*again, *regrads], strict=True):
        torch.testing.assert_close(a, b)
    assert plain[1].shape[1:] == (4, *[plain[1].shape[-1]] * 2)


@modes(*toys.NAMES)
def test_learned_gate_in_training(name: str, mode: str) -> None:
    """8: y = score * computed + (1 - score) * stored; the gradient of the score is that of the hand-written loop."""
    model = prepared(name, mode)
    attentions = [b for b in model.blocks if not b.is_transition]
    gate = LearnedGate(len(attentions))
    plan = toys.schedule(model, 2, ("cond",))
    run = Run(model, [gate], schedule=plan, conditions={"cond": toys.condition(model, 2)})
    x = toys.latent()
    with torch.no_grad():
        first = run.predict(x, plan.clock(0))["cond"]
    loss = run.predict(x - first, plan.clock(1))["cond"].square().mean()
    (got,) = torch.autograd.grad(loss, [gate.logits])

    scores = torch.full((len(attentions),), 0.5).logit().requires_grad_()
    memory = model.prepare(toys.condition(model, 2))
    stored: dict[int, Any] = {}

    def call(i: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
        if i not in stored:
            streams, kept = block(streams, context, BlockPlan(keep=("attn",)), given)
            stored[i] = tree_map(torch.Tensor.detach, kept["attn"])
            return streams, kept
        _, kept = block(streams, context, BlockPlan(keep=("attn",)), given)
        w = scores[i].sigmoid()
        mixed = tree_map(lambda c, s: w * c + (1 - w) * s, kept["attn"], stored[i])
        return block(streams, context, BlockPlan((("attn", Action.REUSE),)), {**given, "attn": mixed})

    for s, latent in enumerate((x, x - first)):
        time = torch.full((2,), plan.native[s], dtype=torch.float64)
        streams, context = model.embed(latent, time, memory)
        out = model.head(loop(model, streams, context, call), context)
    (expected,) = torch.autograd.grad(out.square().mean(), [scores])
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


@modes(*toys.NAMES)
def test_gradient_on_a_latent_stops_after_a_block(name: str, mode: str) -> None:
    """9: a feature loss moves the latent; nothing after the block runs."""
    model = prepared(name, mode)
    for p in model.parameters():
        p.requires_grad_(False)
    tap = Tap("block_out", 1, gradient=True)
    captures = Captures([tap])
    plan = toys.schedule(model, 1, ("cond",))
    run = Run(model, [captures], schedule=plan, conditions={"cond": toys.condition(model, 2)})
    calls: list[int] = []
    hooks = [b.register_forward_pre_hook(lambda *_, i=i: calls.append(i)) for i, b in enumerate(model.blocks)]
    x = toys.latent().requires_grad_()
    run.until(x, plan.clock(0), block=1)
    (got,) = torch.autograd.grad(captures.seen[tap][0].square().sum(), [x])
    for h in hooks:
        h.remove()
    assert calls == [0, 1]

    y = toys.latent().requires_grad_()
    time = torch.full((2,), plan.native[0], dtype=torch.float64)
    streams, context = model.embed(y, time, model.prepare(toys.condition(model, 2)))
    (expected,) = torch.autograd.grad(loop(model, streams, context, last=2)["image"].square().sum(), [y])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dit", pytest.param("mmdit", marks=pytest.mark.slow)])
def test_no_recompilation_after_warm_up(name: str) -> None:
    """A second run with the same plans compiles nothing."""
    torch._dynamo.reset()
    model = prepared(name, "compiled")
    handlers = lambda: [Broadcast(2), SomeRows(3)]  # noqa: E731
    by_run(model, handlers())
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    by_run(model, handlers())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
