"""ToCa: the published schedule and numbers of tokens, what it picks, and its two limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.caches.toca import ToCa
from ditloom.caches.tokens import Look, spread
from ditloom.contracts.clock import Clock
from ditloom.contracts.errors import UserError
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.streams import Context, Streams
from tests.caches.acting import REUSE, ROWS, bound, counted, drawn
from tests.sites import toys
from tests.sites.driving import by_hand, by_run, follow, loop, same, start

DDIM = ToCa()
DDPM = ToCa(interval=4, step_weight=0.4, layer_weight=0.8)
# Full steps and tokens of 256 that Shenyi-Z/ToCa at e84096ff computes in DiT-XL/2 (28 blocks), interval 3, ratio 0.07.
FULL_50 = [0, 4, 5, 9, 13, 17, 19, 22, 25, 28, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49]
FRESH_50 = {(1, 0): 0, (14, 13): 8, (16, 27): 19, (21, 0): 27, (27, 27): 66, (36, 13): 87, (40, 27): 122, (46, 0): 98}
FULL_250 = [0, 4, 9, 15, 21, 27, 33, 39, 44, 49, 54, 59, 64, 69, 74, 79, 84, 89, 94, 97, 101, 105, 109, 113, 117]
FRESH_250 = {(1, 0): 48, (3, 13): 28, (6, 27): 5, (18, 0): 53, (37, 13): 33}


def test_full_steps_are_those_of_the_official_code() -> None:
    assert [s for s, cached in enumerate(DDIM.cached(50)) if not cached] == FULL_50
    assert [s for s, cached in enumerate(DDPM.cached(250)) if not cached][:25] == FULL_250


@pytest.mark.parametrize("settings, steps, golden", [(DDIM, 50, FRESH_50), (DDPM, 250, FRESH_250)])
def test_tokens_are_as_many_as_in_the_official_code(settings: ToCa, steps: int, golden: Any) -> None:
    found = {(s, b): settings.fresh(b, 28, Clock(s, steps), 256) for s, b in golden}
    assert found == golden


@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_ratio_zero_is_fora(name: str) -> None:
    """To the bit and to the last MAC: no map of attention is made."""
    model = toys.make(name)
    runs = [drawn(model, spec, steps=8) for spec in ("toca:ratio=0,interval=3", "fora:interval=3")]
    assert same(runs[0][0], runs[1][0]) and runs[0][1].report.macs == runs[1][1].report.macs


def test_every_token_is_an_attention_cache() -> None:
    """With all of them computed nothing of a feed-forward is reused."""
    model = toys.make("dit")
    every = "toca:interval=2,ratio=1.0,step_weight=0,layer_weight=0"
    plan = [s for s, cached in enumerate(ToCa(interval=2, ratio=1.0).cached(6)) if cached]

    stored: dict[int, Tensor] = {}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        def call(i: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
            if s in plan:
                return block(streams, context, BlockPlan((("attn", REUSE),)), {**given, "attn": stored[i]})
            streams, kept = block(streams, context, BlockPlan(keep=("attn",)), given)
            stored[i] = kept["attn"]
            return streams, kept

        return loop(model, streams, context, call)

    torch.testing.assert_close(drawn(model, every)[0], by_hand(model, step), atol=1e-6, rtol=1e-6)
    assert plan


SOME = "toca:interval=5,ratio=0.1,step_weight=0,layer_weight=0"
"""A quarter of the tokens: 4 of 16."""


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_against_a_loop(name: str, batched: bool) -> None:
    """Attention received by image tokens from image tokens, ages, windows: of the conditional rows, for all rows."""
    model: Any = toys.make(name)
    settings = ToCa(interval=5, ratio=0.1, step_weight=0, layer_weight=0)
    cached = settings.cached(6)
    kept: dict[int, dict[str, Any]] = {}
    received: dict[int, Tensor] = {}
    age: dict[int, Tensor] = {}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        image = streams.layout.stream_slice("image")

        def call(i: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
            if not cached[s]:
                streams, out = block(streams, context, BlockPlan(keep=(*block.sites, "logits")), given)
                maps = out.pop("logits")[:2, :, image, image].softmax(-1).mean(1).sum(1)
                received[i], age[i], kept[i] = maps / maps.norm(dim=1, keepdim=True), torch.zeros(2, 16), out
                return streams, out
            score = received[i] + 0.25 * age[i] / 5
            for sample in range(2):
                for y in (0, 2):
                    for x in (0, 2):
                        window = [y * 4 + x, y * 4 + x + 1, y * 4 + x + 4, y * 4 + x + 5]
                        best = max(window, key=lambda n: float(score[sample, n]))
                        score[sample, best] *= 1.6
            chosen = score.topk(4, dim=1).indices
            age[i] = (age[i] + 1).scatter(1, chosen, 0.0)
            reuse = BlockPlan(tuple((k, REUSE) for k in block.sites if k != "mlp"), ("mlp",))
            fresh = block(streams, context, reuse, {**given, **kept[i]})[1]["mlp"]
            at = chosen.repeat(2, 1)[..., None].expand(-1, -1, 64)
            kept[i]["mlp"] = kept[i]["mlp"].scatter(1, at, fresh.gather(1, at))
            plan = BlockPlan(tuple((k, REUSE) for k in block.sites))
            return block(streams, context, plan, {**given, **kept[i]})

        return loop(model, streams, context, call)

    got, run = drawn(model, SOME, batched=batched)
    torch.testing.assert_close(got, by_hand(model, step), atol=1e-5, rtol=1e-5)
    assert run.report.count("mlp", ROWS) == 2 * len(model.blocks) * sum(cached) > 0


@pytest.mark.parametrize("name", ["dit", "mmdit", "u-vit", "u-toy"])
@pytest.mark.parametrize("score", ["attention", "small-values", "age"])
def test_macs_of_every_score(name: str, score: str) -> None:
    model = toys.make(name)
    run = start(model, [bound(f"{SOME},score={score}", model)])
    with counted() as macs:
        follow(run)
    assert run.report.macs == macs[0]


def chosen_over(steps: int, spec: str) -> list[set[int]]:
    """The tokens of block 1 chosen for the first picture, on every cached step."""
    model = toys.make("dit")
    handler: Any = bound(spec, model)
    seen: list[set[int]] = []
    rows = handler.rows

    def noting(site: Any, *rest: Any) -> Tensor:
        index: Tensor = rows(site, *rest)
        assert torch.equal(index[:2], index[2:]), "both branches compute the same tokens"
        if site.block == 1:
            seen.append(set(index[0].tolist()))
        return index

    handler.rows = noting
    follow(start(model, [handler], steps=steps))
    return seen


def test_age_alone_goes_round() -> None:
    """With a large weight of age no token waits longer than it takes to compute all others."""
    seen = chosen_over(6, "toca:interval=6,ratio=0.1,step_weight=0,layer_weight=0,age_weight=100,score=age,bonus=0.0")
    assert len(seen) >= 4 and all(len(tokens) == 4 for tokens in seen)
    assert set.union(*seen[:4]) == set(range(16))


def test_without_age_the_same_tokens_stay() -> None:
    seen = chosen_over(5, f"{SOME},age_weight=0")
    assert len(seen) > 1 and all(tokens == seen[0] for tokens in seen)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (2, 2, 4)])
def test_the_best_of_every_window_is_raised(grid: tuple[int, ...]) -> None:
    """Also on grids of odd sides, frame by frame, and not for tokens that are no part of the image."""
    frames, (h, w) = grid[:-2], grid[-2:]
    count = h * w * (frames[0] if frames else 1)
    score = torch.rand(2, count + 2, generator=torch.Generator().manual_seed(0)) + 0.1
    raised = spread(score, Look("logits", 0, image=(2, count + 2), grid=grid), 0.6)
    assert torch.equal(raised[:, :2], score[:, :2])
    ratio = (raised / score)[:, 2:].reshape(2, -1, h, w)
    windows = -(-h // 2) * -(-w // 2)
    assert ((ratio - 1.6).abs() < 1e-5).sum() == 2 * windows * ratio.shape[1]
    assert ((ratio - 1).abs() < 1e-5).sum() == ratio.numel() - 2 * windows * ratio.shape[1]


def test_interval_one_changes_no_bit() -> None:
    assert same(drawn(toys.make("mmdit"), "toca:interval=1")[0], by_run(toys.make("mmdit"))[0])


def test_bad_input() -> None:
    from tests.caches.pyramid import pyramid

    with pytest.raises(UserError, match="^toca computes a few tokens of a feed-forward alone, which the blocks of dit"):
        bound("toca", pyramid())
    with pytest.raises(UserError, match="^ratio is a share in 0..1; got 2$"):
        bound("toca:ratio=2", toys.make("dit"))
    with pytest.raises(UserError, match="^unknown score of tokens 'atention': did you mean 'attention'"):
        bound("toca:score=atention", toys.make("dit"))
