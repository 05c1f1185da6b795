"""Every pair of registered caches: it runs and does not depend on the order of writing, or is refused in a sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.caches.predictors import Taylor
from ditloom.caches.presets import STACKS, expanded
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import mean_change
from ditloom.contracts.plan import Action, BlockPlan
from ditloom.contracts.registries import METHODS
from ditloom.contracts.settings import registered
from ditloom.contracts.streams import Context, Streams
from ditloom.sites import combine
from ditloom.sites.program import build
from tests.caches.acting import bound, drawn, surface_of
from tests.caches.every import CACHES, acting, model_of, plan_of, reused
from tests.caches.test_toca_text import pixart
from tests.sites import toys
from tests.sites.driving import STEPS, by_hand, follow, loop, moved, same, start

LAYOUTS = ("dit", "mmdit", "u-vit")
PAIRS = list(combinations(CACHES, 2))


def legal(name: str, pair: Sequence[str]) -> str:
    """Nothing, or the sentence of a refusal."""
    known = {key: plan_of(key, name) for key in pair}
    parts = ({k: getattr(p, what) for k, p in known.items()} for what in ("controls", "steps", "taps"))
    try:
        combine.check(combine.canonical([p.handler for p in known.values()]), *parts)
    except UserError as error:
        return str(error)
    return ""


def pairs_on(name: str) -> list[tuple[str, str]]:
    """Those whose methods both fit a layout."""
    return [(a, b) for a, b in PAIRS if acting(a, name) is not None and acting(b, name) is not None]


@pytest.mark.parametrize("name", LAYOUTS)
def test_illegal_pairs_are_refused_by_both_names_and_a_reason(name: str) -> None:
    """Before anything runs, in the same words whatever the order."""
    refused = []
    for pair in pairs_on(name):
        sentence = legal(name, pair)
        assert sentence == legal(name, pair[::-1])
        if sentence:
            refused.append(pair)
            reason = rf"^{pair[0]} and {pair[1]} cannot run together: both control .+ at step \d; give them windows"
            assert re.match(reason, sentence), sentence
    assert ("fora", "taylorseer") in refused and ("dbcache", "teacache") in refused or name == "u-vit"
    assert 5 < len(refused) < len(pairs_on(name)) - 5


def check(name: str, pair: tuple[str, str]) -> None:
    """A legal pair runs, reuses something, and gives the same result however it is written."""
    handlers: list[Any] = [acting(key, name) for key in pair]
    if legal(name, pair):
        return
    ends = []
    for order in (handlers, handlers[::-1]):
        run = start(model_of(name), order)
        ends.append(follow(run)[0])
        assert reused(run) > 0 and ends[-1].isfinite().all()
    assert same(*ends)


@pytest.mark.parametrize(
    "pair",
    [("fora", "guidance-gate"), ("dbcache", "pab"), ("skip-dit", "toca"), ("taocache", "taylorseer")],
    ids="+".join,
)
def test_pairs_in_any_order(pair: tuple[str, str]) -> None:
    name = "u-vit" if "skip-dit" in pair else "mmdit"
    if acting(pair[0], name) is not None and acting(pair[1], name) is not None:
        check(name, pair)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_pairs_in_any_order(name: str) -> None:
    for pair in pairs_on(name):
        check(name, pair)


def test_late_taocache_over_early_teacache() -> None:
    """Step 1 adds the last change of the stack; 3 and 4 go on from the outputs of 1 and 2."""
    model = toys.make("dit")
    tea = "teacache:fit=identity,mask=1/1/4,policy=static,warmup=0,tail=0,end=0.5"
    got, run = drawn(model, tea, "taocache:start=0.5,alpha=0.7,computed=2")
    kept: dict[str, Any] = {}
    outputs: dict[int, Tensor] = {}
    conditions, plan = toys.conditions(model), toys.schedule(model, STEPS)
    memory = model.prepare(Condition.cat([conditions["cond"], conditions["uncond"]]))
    x = toys.latent()
    with torch.no_grad():
        for s in range(STEPS):
            if s in (3, 4):
                grown = 0.7 if s == 3 else 0.7 + 0.7 * 0.7
                outputs[s] = outputs[2] + grown * (outputs[2] - outputs[1])
            else:
                time = torch.full((4,), plan.native[s], dtype=torch.float64)
                streams, context = model.embed(torch.cat([x, x]), time, memory)
                if s == 1:
                    out = Streams({"image": streams["image"] + kept["change"]}, streams.layout)
                else:
                    out = loop(model, streams, context)
                    kept["change"] = out["image"] - streams["image"]
                outputs[s] = model.head(out, context)
            x = moved(x, {"cond": outputs[s][:2], "uncond": outputs[s][2:]})
    assert {s for (s, b) in run.report.cells if b == -1} == {3, 4}
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", [0, 1])
def test_dbcache_with_taylor(order: int) -> None:
    """The change after the first block is forecast while the first block's own change stays alike."""
    model = toys.make("mmdit")
    state: dict[str, Any] = {"history": [], "reused": 0}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        after = loop(model, streams, context, last=1)
        residual = (after["image"] - streams["image"])[:2]
        if s >= 2 and float(mean_change(residual, state["residual"])) < 0.35:
            state["reused"] += 1
            change = Taylor(order)(state["history"], s)
            return Streams({k: v + change[k] for k, v in after.tokens.items()}, after.layout)
        out = loop(model, after, context, first=1)
        change = {k: out.tokens[k] - after.tokens[k] for k in out.tokens}
        state.update(residual=residual, history=[*state["history"], (s, change)][-order - 1 :])
        return out

    expected = by_hand(model, step)
    got, run = drawn(model, f"dbcache:first=1,warmup=2,threshold=0.35,predictor=taylor:order={order}")
    assert 0 < state["reused"] < 4
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert run.report.count("range", Action.REUSE) == 2 * state["reused"]


def test_guidance_gate_over_dbcache() -> None:
    """Up to step 3 both branches under DBCache; then the conditional one alone, computed, plus the last gap."""
    model = toys.make("dit")
    both = ("dbcache:first=1,warmup=1,threshold=9.0,mask=1/1/1/1/1/1,policy=static", "guidance-gate:start=3")
    got, run = drawn(model, *both)
    kept: dict[str, Any] = {}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        after = loop(model, streams, context, last=1)
        if s == 1:
            return Streams({"image": after["image"] + kept["change"]}, after.layout)
        out = loop(model, after, context, first=1)
        kept["change"] = out["image"] - after["image"]
        return out

    conditions, plan = toys.conditions(model), toys.schedule(model, STEPS)
    memory = model.prepare(Condition.cat([conditions["cond"], conditions["uncond"]]))
    x = toys.latent()
    with torch.no_grad():
        for s in range(STEPS):
            time = torch.full((4,), plan.native[s], dtype=torch.float64)
            streams, context = model.embed(torch.cat([x, x]), time, memory)
            out = model.head(step(s, streams, context), context)
            cond, uncond = out[:2], out[2:]
            if s < 3:
                kept["gap"] = uncond - cond
            x = moved(x, {"cond": cond, "uncond": cond + kept["gap"]})
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)
    assert run.report.forwards == 6 + 3 and run.report.count("range", Action.REUSE) == 2


def test_broadcast_under_a_step_cache() -> None:
    """The stack is reused on 1 and 4; inside the computed steps attentions are, on odd ones, whatever was skipped."""
    model = toys.make("mmdit")
    tea = "teacache:fit=identity,mask=1/1/2/1/1,policy=static,warmup=0,tail=0"
    got, run = drawn(model, tea, "pab:low=0.0,high=2.0")
    stored: dict[int, Any] = {}
    kept: dict[str, Any] = {}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        if s in (1, 4):
            return Streams({k: v + kept[k] for k, v in streams.tokens.items()}, streams.layout)

        def call(i: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
            if s % 2:
                return block(streams, context, BlockPlan((("attn", Action.REUSE),)), {**given, "attn": stored[i]})
            streams, now = block(streams, context, BlockPlan(keep=("attn",)), given)
            stored[i] = now["attn"]
            return streams, now

        out = loop(model, streams, context, call)
        kept.update({k: out.tokens[k] - streams.tokens[k] for k in out.tokens})
        return out

    torch.testing.assert_close(got, by_hand(model, step), atol=1e-5, rtol=1e-5)
    assert run.report.counts["attn(0)", "reuse"] == 2 * 2 and run.report.count("range", Action.REUSE) == 2 * 2


def test_delta_dit_then_fora() -> None:
    """Each in its half of the run: a range on step 1, sub-modules on 4; both keep what they need from before."""
    model = toys.make("dit")
    got, run = drawn(model, "delta-dit:blocks=3,end=0.5", "fora:interval=2,start=0.5")
    stored: dict[int, Any] = {}
    kept: dict[str, Any] = {}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        def call(i: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
            if s == 4:
                plan = BlockPlan(tuple((k, Action.REUSE) for k in block.sites))
                return block(streams, context, plan, {**given, **stored[i]})
            streams, stored[i] = block(streams, context, BlockPlan(keep=block.sites), given)
            return streams, stored[i]

        early = loop(model, streams, context, call, last=2)
        if s == 1:
            return Streams({"image": early["image"] + kept["change"]}, early.layout)
        out = loop(model, early, context, call, first=2)
        kept["change"] = out["image"] - early["image"]
        return out

    torch.testing.assert_close(got, by_hand(model, step), atol=1e-5, rtol=1e-5)
    assert run.report.counts["range(2,5)", "reuse"] == 2 and run.report.counts["mlp(0)", "reuse"] == 2


@pytest.mark.parametrize("name", STACKS)
def test_presets_are_legal(name: str) -> None:
    """On a model deep enough for their settings; calibrated methods by a number."""
    listed = [spec.replace("taocache:", "taocache:alpha=0.8,") for spec in expanded([f"preset:{name}"])]
    assert listed and all(registered(METHODS, spec) for spec in STACKS[name])
    model = pixart() if name == "toca-text" else toys.make("dit")
    for orders in (listed, listed[::-1]):
        build([bound(spec, model) for spec in orders], toys.schedule(model, 20), surface_of(model))


def test_an_unknown_preset() -> None:
    with pytest.raises(UserError, match="^unknown preset 'gated-dbcach': did you mean 'gated-dbcache'"):
        expanded(["fora", "preset:gated-dbcach"])
