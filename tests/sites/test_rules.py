"""Attention rules: every plan is the dense one, nothing leaks, and builders have the properties they promise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ditloom.contracts.clock import Clock, Rows
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Span
from ditloom.contracts.method import Handler
from ditloom.parts.attention import attend
from ditloom.sites.rules import (
    Allow,
    Causal,
    Isolate,
    LocalWindow,
    Mask,
    Only,
    Padding,
    Plan,
    Regions,
    Rule,
    Scenes,
    Term,
    both,
    dense,
    is_open,
    pairs,
    rule,
    settle,
)
from tests.sites import toys
from tests.sites.driving import same, start
from tests.sites.walkthroughs import Regional

GRID = (4, 4)
LAYOUT = Layout((Span("image", 16), Span("control", 4), Span("text", 5, "text"), Span("layout", 3, "text")), GRID)
SCENES = Layout((Span("v1", 4), Span("v2", 6), Span("t1", 2, "text"), Span("t2", 3, "text")))
N = LAYOUT.length()
FIRST, SECOND = ("image", "text"), ("image", "layout")


def gates(batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    padding = torch.ones(batch, 5, dtype=torch.bool)
    padding[0, 3:] = False
    weight = torch.rand(batch, N, generator=g)
    regions = torch.zeros(batch, 2, 16, dtype=torch.bool)
    regions[:, 0, :6], regions[:, 1, 4:10] = True, True
    return {"text_mask": padding, "first": weight, "second": 1 - weight, "regions": regions}


RULES: Mapping[str, tuple[Layout, Rule, tuple[str, ...]]] = {
    "nothing": (LAYOUT, rule(), ("none",)),
    "isolate": (LAYOUT, rule(Isolate(("control", "layout"))), ("split",)),
    "only": (LAYOUT, rule(Only(("image",), ("image", "text"))), ("split",)),
    "scenes": (SCENES, rule(Scenes(("t1", "t2"), ("v1", "v2"))), ("split",)),
    "padding": (LAYOUT, rule(Padding()), ("dense",)),
    "window": (LAYOUT, rule(LocalWindow(1.5)), ("dense",)),
    "square": (LAYOUT, rule(LocalWindow(1, "square")), ("dense",)),
    "causal": (LAYOUT, rule(Causal("image", 4, 2)), ("dense",)),
    "regions": (LAYOUT, rule(Regions(("text", "layout"))), ("dense",)),
    "siamese": (
        LAYOUT,
        Rule((Term((Only(FIRST, FIRST),), "first"), Term((Only(SECOND, SECOND),), "second"))),
        ("split", "split"),
    ),
    "isolate and padding": (LAYOUT, rule(Isolate(("control",)), Padding()), ("dense",)),
    "isolate and only": (LAYOUT, rule(Isolate(("control",)), Only(("image",), ("image", "control"))), ("split",)),
}


def qkv(layout: Layout, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, layout.length(), 4, 8, generator=g, dtype=torch.float64) for _ in range(3))
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, given: Rule, layout: Layout, known: Mapping[str, Tensor]) -> Tensor:
    """Every term by explicit softmax over a boolean matrix."""
    total: Any = 0
    for term in given.terms:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~dense(term, layout, known)[:, None], -torch.inf)
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        weight = known[term.weight][..., None] if isinstance(term.weight, str) else term.weight
        total = total + weight * out
    return total


@pytest.mark.parametrize("name", RULES)
def test_the_cheapest_plan_is_exact(name: str) -> None:
    layout, given_rule, kinds = RULES[name]
    q, k, v = qkv(layout)
    settled, tensors = settle(given_rule, layout, gates())
    assert tuple(plan.kind for plan in settled.plans) == kinds
    expected = by_hand(q, k, v, given_rule, layout, gates())
    torch.testing.assert_close(attend(q, k, v, layout, settled, tensors), expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(attend(q, k, v, layout, given_rule, gates()), expected, atol=1e-10, rtol=1e-10)
    forced = replace(settled, plans=tuple(Plan("dense", plan.weight) for plan in settled.plans))
    masks = {f"mask.{n}": dense(term, layout, gates()) for n, term in enumerate(given_rule.terms)}
    torch.testing.assert_close(attend(q, k, v, layout, forced, {**gates(), **masks}), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", RULES)
def test_gradients_across_forbidden_pairs_are_exactly_zero(name: str) -> None:
    """In one layer, values and keys that a query may not see do not move its output at all."""
    layout, given_rule, _ = RULES[name]
    q, k, v = qkv(layout)
    settled, tensors = settle(given_rule, layout, gates())
    seen = torch.stack([dense(term, layout, gates()).expand(2, -1, -1) for term in given_rule.terms]).any(0)
    for query in range(0, layout.length(), 5):
        k, v = k.detach().requires_grad_(), v.detach().requires_grad_()
        out = attend(q, k, v, layout, settled, tensors)[:, query].sum()
        for gradient in torch.autograd.grad(out, (k, v)):
            moved = gradient.abs().sum((2, 3)) > 0
            assert not bool((moved & ~seen[:, query]).any())
            assert bool((moved == seen[:, query]).float().mean() > 0.9)


@pytest.mark.parametrize("name", RULES)
def test_appended_keys_are_seen_by_every_query(name: str) -> None:
    layout, given_rule, _ = RULES[name]
    q, k, v = qkv(layout)
    settled, tensors = settle(given_rule, layout, gates())
    more = tuple(torch.randn(2, 3, 4, 8, dtype=torch.float64) for _ in range(2))

    class At:
        extra_keys = more

        def wants(self, stage: str) -> bool:
            return False

    got = attend(q, k, v, layout, settled, tensors, At())  # type: ignore[arg-type]
    total: Any = 0
    for term in given_rule.terms:
        mask = F.pad(dense(term, layout, gates()), (0, 3), value=True)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, torch.cat([k, more[0]], 1)) / 8**0.5
        out = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ torch.cat([v, more[1]], 1).transpose(1, 2)
        weight = gates()[term.weight][..., None] if isinstance(term.weight, str) else term.weight
        total = total + weight * out.transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, total, atol=1e-10, rtol=1e-10)
    assert pairs(settled, 3) - pairs(settled) == 3 * layout.length() * len(given_rule.terms)


@pytest.mark.parametrize("name", [n for n in RULES if "dense" not in RULES[n][2]])
def test_pairs_are_those_that_are_evaluated(name: str) -> None:
    layout, given_rule, _ = RULES[name]
    settled, _ = settle(given_rule, layout, gates())
    assert pairs(settled) == sum(int(dense(term, layout, gates())[0].sum()) for term in given_rule.terms)


@pytest.mark.parametrize("first", [n for n in RULES if RULES[n][0] is LAYOUT and n != "siamese"])
@pytest.mark.parametrize("second", ["isolate", "padding", "window", "causal", "only", "siamese"])
def test_composition_commutes_and_only_restricts(first: str, second: str) -> None:
    a, b = RULES[first][1], RULES[second][1]
    forward, backward = both(a, b), both(b, a)
    assert forward is not None and backward is not None
    for one, other, own in zip(forward.terms, backward.terms, b.terms, strict=True):
        mask = dense(one, LAYOUT, gates())
        assert torch.equal(mask, dense(other, LAYOUT, gates()))
        assert torch.equal(mask, (dense(own, LAYOUT, gates()) & dense(a.terms[0], LAYOUT, gates())))
        assert one.weight == other.weight == own.weight


def test_composition_with_nothing() -> None:
    a = rule(Isolate(("control",)))
    assert both(None, None) is None and both(a, None) == a == both(None, a)
    assert Isolate(("control",)) & Padding() == rule(Isolate(("control",)), Padding())
    siamese = RULES["siamese"][1]
    with pytest.raises(UserError, match="both weighted sums cannot be combined"):
        both(siamese, siamese)


def boxes() -> Any:
    """Two disjoint boxes on the 4x4 grid: one in the upper half, one in the lower."""
    corner = st.tuples(st.integers(0, 3), st.integers(0, 3))
    return st.tuples(corner, corner, st.integers(0, 1), st.integers(0, 1))


@given(boxes())
@settings(max_examples=50, deadline=None)
def test_regions(drawn: Any) -> None:
    """Symmetric, no empty row; text i sees its box and itself; boxes that are disjoint do not see each other."""
    (a, b), (c, d), top, bottom = drawn
    regions = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    regions[0, 0, 0 : top + 1, min(a, b) : max(a, b) + 1] = True
    regions[0, 1, 2 : bottom + 3, min(c, d) : max(c, d) + 1] = True
    mask = dense(Term((Regions(("text", "layout")),)), LAYOUT, {"regions": regions.flatten(2)})[0]
    known = torch.ones(N, dtype=torch.bool)
    known[LAYOUT.joint_slice("control")] = False
    image, text = LAYOUT.joint_slice("image"), LAYOUT.joint_slice("text")
    assert torch.equal(mask[known][:, known], mask[known][:, known].T) and bool(mask.any(1).all())
    first, second = regions.flatten(2)[0]
    within = mask[image, image]
    assert not bool(within[first][:, second].any()) and bool(within[first][:, first].all())
    uncovered = ~(first | second)
    assert bool(within[uncovered][:, uncovered].all()) and not bool(within[uncovered][:, first].any())
    assert torch.equal(mask[text, image], first.expand(5, 16))
    assert not bool(mask[text, LAYOUT.joint_slice("layout")].any()) and bool(mask[text, text].all())


def test_scenes() -> None:
    """Text i sees itself and video i; all videos see each other."""
    mask = dense(RULES["scenes"][1].terms[0], SCENES, {})[0]
    at = SCENES.joint_slice
    allowed = {("v1", "v1"), ("v1", "v2"), ("v2", "v1"), ("v2", "v2"), ("t1", "t1"), ("t2", "t2")}
    allowed |= {("t1", "v1"), ("v1", "t1"), ("t2", "v2"), ("v2", "t2")}
    for q in ("v1", "v2", "t1", "t2"):
        for k in ("v1", "v2", "t1", "t2"):
            assert bool(mask[at(q), at(k)].all()) == bool(mask[at(q), at(k)].any()) == ((q, k) in allowed)


@pytest.mark.parametrize("window", [0, 1, 2])
def test_causal(window: int) -> None:
    mask = dense(Term((Causal("image", 4, window),)), LAYOUT, {})[0]
    chunk = torch.arange(16) // 4
    behind = chunk[:, None] - chunk[None]
    expected = (behind >= 0) & ((behind < window) if window else True)
    assert torch.equal(mask[:16, :16], expected) and bool(mask[16:].all()) and bool(mask[:, 16:].all())


@pytest.mark.parametrize("shape, radius", [("disc", 1.0), ("disc", 1.5), ("square", 1), ("disc", 0.0)])
def test_local_window(shape: Any, radius: float) -> None:
    mask = dense(Term((LocalWindow(radius, shape),)), LAYOUT, {})[0][:16, :16]
    for q in range(16):
        for k in range(16):
            dy, dx = q // 4 - k // 4, q % 4 - k % 4
            inside = max(abs(dy), abs(dx)) <= radius if shape == "square" else dy**2 + dx**2 <= radius**2
            assert bool(mask[q, k]) == inside


def test_siamese_is_the_sum_of_two_attentions() -> None:
    """Image queries get both; text only the first and layout only the second, by the gates."""
    q, k, v = qkv(LAYOUT)
    at = LAYOUT.joint_slice
    first, second = torch.ones(2, N), torch.ones(2, N)
    first[:, at("layout")], second[:, at("text")] = 0, 0
    got = attend(q, k, v, LAYOUT, RULES["siamese"][1], {"first": first, "second": second})

    def alone(queries: str, *keys: str) -> Tensor:
        chosen = torch.cat([torch.arange(N)[at(name)] for name in keys])
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, at(queries)], k[:, chosen]) / 8**0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, chosen]).flatten(2)

    image = alone("image", "image", "text") + alone("image", "image", "layout")
    torch.testing.assert_close(got[:, at("image")], image, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(got[:, at("text")], alone("text", "image", "text"), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(got[:, at("layout")], alone("layout", "image", "layout"), atol=1e-10, rtol=1e-10)


@dataclass(frozen=True)
class Nothing(Mask):
    """Every second image token sees no other image token."""

    def pair(self, query: str, key: str) -> Allow:
        return Allow.SOME if query == "image" else Allow.ALL

    def block(self, query: str, key: str, layout: Layout, gates: Mapping[str, Tensor]) -> Tensor:
        return (torch.arange(16) % 2 == 0)[None, :, None]


def test_a_query_that_sees_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="leaves segment 'image' nothing to attend to"):
        settle(rule(Only(("image",), ("nowhere",))), LAYOUT, {})
    with pytest.raises(UserError, match="leaves segment 'control' nothing to attend to"):
        settle(rule(Isolate(("control",)), Only(("control",), ("image",))), LAYOUT, {})
    with pytest.raises(UserError, match="leaves 8 query tokens nothing to attend to"):
        settle(rule(Nothing()), LAYOUT, {})
    padded = {"text_mask": torch.zeros(2, 5, dtype=torch.bool)}
    settle(rule(Padding()), LAYOUT, padded)
    with pytest.raises(UserError, match="leaves 10 query tokens nothing to attend to"):
        settle(rule(Padding(), Only(("text",), ("text",))), LAYOUT, padded)


def test_open_segments() -> None:
    assert is_open(None, "control", LAYOUT) and is_open(rule(Padding()), "control", LAYOUT)
    assert is_open(rule(Isolate(("control",))), "control", LAYOUT)
    assert not is_open(rule(Only(("text",), ("text",))), "control", LAYOUT)
    assert not is_open(rule(Padding()), "text", LAYOUT)


@dataclass
class Ruled(Handler):
    """A rule on every step."""

    given: Rule
    key: str = "ruled"

    def rule(self, layout: Layout, clock: Clock, rows: Rows) -> Any:
        return self.given, {}


@pytest.mark.parametrize("name", ["mmdit", "u-vit-text"])
def test_padding_is_as_if_the_words_were_not_there(name: str) -> None:
    model = toys.make(name)
    full = toys.condition(model, 2)
    assert full.text is not None
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4:] = False
    scrambled = full.text.clone()
    scrambled[:, 4:] = 99.0
    masked = Condition(text=scrambled, text_mask=mask, pooled=full.pooled)
    short = Condition(text=full.text[:, :4], pooled=full.pooled)
    with torch.no_grad():
        got, expected = (model(toys.latent(), torch.full((2,), 0.4), c) for c in (masked, short))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_rules_of_several_methods_and_of_the_prompt_compose() -> None:
    """Each restricts; the prompt's own padding stays."""
    model = toys.make("mmdit")
    condition = toys.condition(model, 2)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 3:] = False
    masked = replace(condition, text_mask=mask)
    first, second = rule(LocalWindow(1)), rule(Only(("text",), ("text",)))

    def once(*handlers: Handler) -> Tensor:
        run = start(model, handlers, steps=1, branches=("cond",), conditions={"cond": masked})
        with torch.no_grad():
            return run.predict(toys.latent(), run.schedule.clock(0))["cond"]

    apart = once(Ruled(first, "a"), Ruled(second, "b"))
    joint = both(first, second)
    assert joint is not None
    assert same(apart, once(Ruled(joint))) and same(apart, once(Ruled(second, "a"), Ruled(first, "b")))
    assert not torch.allclose(apart, once(Ruled(first)), atol=1e-4)
    scrambled = condition.text.clone()  # type: ignore[union-attr]
    scrambled[0, 3:] = 7.0
    masked = replace(masked, text=scrambled)
    torch.testing.assert_close(once(Ruled(first, "a"), Ruled(second, "b")), apart, atol=1e-5, rtol=1e-5)


def test_a_mix_whose_gates_are_all_on_one_side_is_that_side() -> None:
    model = toys.make("mmdit")
    hidden = torch.zeros(1, 6, dtype=torch.bool)
    hidden[:, 3:] = True

    def once(*handlers: Handler) -> Tensor:
        run = start(model, handlers, steps=1)
        with torch.no_grad():
            return run.predict(toys.latent(), run.schedule.clock(0))["cond"]

    torch.testing.assert_close(once(Regional(torch.zeros(1, 22), hidden)), once(), atol=1e-5, rtol=1e-5)
    masked = once(Regional(torch.ones(1, 22), hidden))
    assert not torch.allclose(masked, once(), atol=1e-4)
