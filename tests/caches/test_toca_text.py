"""ToCa on models that read text: its score of the cross-attention, what it picks, and PixArt's schedule."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.backbones.pixart_sigma import PixArt, PixArtConfig
from ditloom.caches.presets import STACKS
from ditloom.caches.toca import ToCa
from ditloom.caches.token_cache import TokenCache
from ditloom.caches.tokens import Look, Text
from ditloom.contracts.clock import Clock, Rows
from ditloom.contracts.errors import UserError
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.settings import parse
from ditloom.contracts.site import Site
from ditloom.contracts.streams import Context, Streams
from tests.caches.acting import REUSE, ROWS, bound, counted, drawn
from tests.sites import toys
from tests.sites.driving import BOTH, by_hand, follow, loop, start

(PIXART,) = STACKS["toca-text"]
SETTINGS = ToCa(**parse(PIXART)[1])
# Shenyi-Z/ToCa at e84096ff, PixArt-alpha-ToCa: steps on which its first block computes everything, and tokens of 256
# by (step, block) in cross-attention and feed-forward, 28 blocks, interval 3, ratio 0.3.
FULL = {20: [0, 4, 6, 9, 12, 15, 18], 50: [0, 4, 8, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45, 48]}
FRESH_20 = {(1, 0): (133, 256), (1, 13): (85, 227), (5, 27): (26, 71), (10, 0): (73, 196), (17, 13): (17, 46)}
# Its first eight picks of the first picture on three cached steps, block 13 of 28, 64 tokens, for the maps made below.
PICKS = (
    ([17, 39, 32, 4, 38, 8, 35, 60], [17, 39, 32, 4, 38, 8, 35, 60]),
    ([57, 15, 62, 27, 58, 41, 63, 22], [44, 19, 31, 42, 46, 14, 11, 16]),
    ([50, 12, 18, 36, 40, 34, 55, 52], [9, 7, 39, 49, 20, 24, 37, 43]),
)


@cache
def pixart() -> PixArt:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PixArtConfig(depth=4, text_width=toys.TEXT, learn_sigma=False, **toys.SHAPE).build()
        model = toys.randomise(model)
        with torch.no_grad():
            for block in model.blocks:
                block.cross.q.weight.mul_(20)
        return model


@pytest.mark.parametrize("steps", FULL)
def test_full_steps_are_those_of_the_official_code(steps: int) -> None:
    assert [s for s, cached in enumerate(SETTINGS.cached(steps)) if not cached] == FULL[steps]


def test_tokens_are_as_many_as_in_the_official_code() -> None:
    kinds = ("cross", "mlp")
    found = {(s, b): tuple(SETTINGS.fresh(b, 28, Clock(s, 20), 256, kind) for kind in kinds) for s, b in FRESH_20}
    assert found == FRESH_20


def test_picks_are_those_of_the_official_code() -> None:
    """By entropy over the texts of both branches, windows of 4 x 4 and age; maps renewed where tokens were computed."""
    g, rows = torch.Generator().manual_seed(0), Rows(BOTH, 2)
    handler, memo = TokenCache(SETTINGS, Text(), 28), dict[str, Any]()

    def show(step: int, tokens: int) -> None:
        for branch in BOTH:
            tap = Look("cross_logits", 13, branches=(branch,), image=(0, 64), grid=(8, 8))
            handler.noted(tap, 4 * torch.randn(2, 1, tokens, 6, generator=g), Clock(step, 20), rows, memo)

    show(0, 64)
    for step, expected in enumerate(PICKS, 1):
        sites = [Site(kind, "block", block=13, rows=True) for kind in ("cross", "mlp")]
        cross, mlp = (handler.rows(site, Clock(step, 20), rows, memo) for site in sites)
        assert (cross[0, :8].tolist(), mlp[0, :8].tolist()) == expected
        show(step, cross.shape[1])


SOME = "toca:score=text,interval=3,ratio=0.1,step_weight=0,layer_weight=0,interval_weight=0,sensitive=(),cross=1.9"
"""A quarter of the tokens in feed-forwards, 3 of 16 in cross-attentions."""


@pytest.mark.parametrize("batched", [True, False])
def test_against_a_loop(batched: bool) -> None:
    """Maps of both branches, averaged as entropies; ages by kind of site; text maps renewed for computed tokens."""
    model: Any = pixart()
    settings = ToCa(**parse(SOME)[1])
    cached, some = settings.cached(6), {"cross": 3, "mlp": 4}
    kept: dict[int, dict[str, Any]] = {}
    entropy: dict[int, Tensor] = {}
    age: dict[tuple[int, str], Tensor] = {}

    def told(maps: Tensor) -> Tensor:
        paid = maps.softmax(-1).mean(1)
        return -(paid * (paid + 1e-7).log()).sum(-1)

    def choose(i: int, kind: str) -> Tensor:
        both = 1 + torch.log(torch.tensor(2.0)) + (entropy[i][:2] + entropy[i][2:]) / 2
        score = both / both.norm(dim=1, keepdim=True) + 0.25 * age[i, kind] / 3
        for sample in range(2):
            for corner in (0, 2, 8, 10):
                window = [corner, corner + 1, corner + 4, corner + 5]
                score[sample, max(window, key=lambda n: float(score[sample, n]))] *= 1.6
        chosen = score.topk(some[kind], dim=1).indices
        age[i, kind] = (age[i, kind] + 1).scatter(1, chosen, 0.0)
        return chosen.repeat(2, 1)

    def step(s: int, streams: Streams, context: Context) -> Streams:
        def call(i: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
            given = {**given, **model.handed(i, context)}
            if not cached[s]:
                streams, out = block(streams, context, BlockPlan(keep=(*block.sites, "cross_logits")), given)
                entropy[i], kept[i] = told(out.pop("cross_logits")), out
                age.update({(i, kind): torch.zeros(2, 16) for kind in some})
                return streams, out
            chosen = {kind: choose(i, kind) for kind in some}
            plan = BlockPlan((("attn", REUSE),), ("cross", "cross_logits"))
            fresh = block(streams, context, plan, {**given, **kept[i]})[1]
            maps = told(fresh["cross_logits"]).gather(1, chosen["cross"])
            entropy[i] = entropy[i].scatter(1, chosen["cross"], maps)
            for kind in ("cross", "mlp"):
                reuse = BlockPlan(tuple((k, REUSE) for k in block.sites if k != kind), (kind,))
                found = block(streams, context, reuse, {**given, **kept[i]})[1][kind]
                at = chosen[kind][..., None].expand(-1, -1, 64)
                kept[i][kind] = kept[i][kind].scatter(1, at, found.gather(1, at))
            return block(streams, context, BlockPlan(tuple((k, REUSE) for k in block.sites)), {**given, **kept[i]})

        return loop(model, streams, context, call)

    got, run = drawn(model, SOME, batched=batched)
    torch.testing.assert_close(got, by_hand(model, step), atol=1e-5, rtol=1e-5)
    assert run.report.count("cross", ROWS) == run.report.count("mlp", ROWS) == 2 * 4 * sum(cached) > 0


@pytest.mark.parametrize("spec", [SOME, PIXART.replace("window=4", "window=2")])
def test_macs_and_one_choice_for_all_branches(spec: str) -> None:
    """Also where a cross-attention computes some tokens, and a feed-forward all of them."""
    model = pixart()
    handler: Any = bound(spec, model)
    asked, rows = [], handler.rows

    def noting(*given: Any) -> Tensor:
        index: Tensor = rows(*given)
        asked.append(torch.equal(index[:2], index[2:]))
        return index

    handler.rows = noting
    run = start(model, [handler], steps=8)
    with counted() as macs:
        follow(run)
    assert run.report.macs == macs[0] < run.report.full_macs
    assert asked and all(asked)


def test_padding_is_no_text() -> None:
    """A text and the same one padded are chosen by alike."""
    model, plain = pixart(), toys.conditions(pixart())
    padded = {
        name: type(one)(
            text=torch.nn.functional.pad(one.text, (0, 0, 0, 3), value=7.0),
            text_mask=torch.tensor([[True] * toys.WORDS + [False] * 3] * 2),
        )
        for name, one in plain.items()
    }
    ends = [follow(start(model, [bound(SOME, model)], conditions=c))[0] for c in (plain, padded)]
    torch.testing.assert_close(*ends, atol=1e-5, rtol=1e-5)


def test_bad_input() -> None:
    with pytest.raises(UserError, match="^toca takes its score from cross_logits, which dit lacks: take score=age$"):
        bound("toca:score=text", toys.make("dit"))
    with pytest.raises(UserError, match="^sensitive is two shares of the run"):
        ToCa(sensitive=(0.3,))
