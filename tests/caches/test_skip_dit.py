"""Skip-Cache on backbones with long skips: which blocks run, what reaches them, and who is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ditloom.contracts.errors import UserError
from ditloom.contracts.streams import Context, Streams
from tests.caches.acting import bound, calls_of, drawn, steps_of
from tests.sites import toys
from tests.sites.driving import by_hand, by_run, same, start


@pytest.mark.parametrize("name", ["u-vit", "u-vit-text", "u-toy"])
def test_against_a_loop(name: str) -> None:
    """On steps 1 and 3 the outer blocks alone: the stored deep value, and the fresh shallow one through its skip."""
    model: Any = toys.make(name)
    last = len(model.blocks) - 1
    deep: dict[str, Any] = {}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        saved: dict[int, Any] = {}
        for p, block in enumerate(model.blocks):
            if s in (3, 5) and 0 < p < last:
                streams = deep["streams"]
                continue
            if p == last:
                deep["streams"] = streams
            given = {"skip": saved[model.skips[p]]} if p in model.skips else {}
            streams, _ = block(streams, context, None, given)
            saved[p] = streams.tokens
        return streams

    if name == "u-toy":  # its skip leaves block 1: two blocks at either end
        with pytest.raises(UserError, match="cannot be reused: the long skip"):
            bound("skip-dit:blocks=2", model)
    else:
        expected = by_hand(model, step)
        got, run = drawn(model, "skip-dit:low=0.0,high=0.6")
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert steps_of(run, f"range(1,{last})") == [3, 5]


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_cached_step_runs_both_ends_only(blocks: int) -> None:
    model = toys.make("u-vit")
    calls = calls_of(model)
    drawn(model, f"skip-dit:blocks={blocks},high=2.0", steps=2)
    ends = [*range(blocks), *range(5 - blocks, 5)]
    assert calls == [0, 1, 2, 3, 4, *ends]


def test_the_current_input_reaches_the_output_through_the_skip() -> None:
    """The gradient of a cached step's prediction; with the merged half of the skip at zero there is none."""
    model: Any = toys.make("u-vit")

    def gradient() -> float:
        run = start(model, [bound("skip-dit:high=2.0", model)], steps=2)
        with torch.no_grad():
            run.predict(toys.latent(), run.schedule.clock(0))
        x = toys.latent(seed=2).requires_grad_()
        (slope,) = torch.autograd.grad(run.predict(x, run.schedule.clock(1))["cond"].sum(), [x])
        return float(slope.abs().max())

    assert gradient() > 0
    with torch.no_grad():
        model.blocks[-1].skip_linear.weight[:, 64:] = 0
    assert gradient() == 0


def test_interval_one_changes_no_bit() -> None:
    model = toys.make("u-vit-text")
    assert same(drawn(model, "skip-dit:interval=1")[0], by_run(model)[0])


@pytest.mark.parametrize("steps, cached", [(1, []), (2, [1]), (5, [3]), (20, [7, 9, 11, 13, 15, 17])])
def test_the_published_window(steps: int, cached: list[int]) -> None:
    """Odd steps with 0.05 < t < 0.7."""
    _, run = drawn(toys.make("u-vit"), "skip-dit", steps=steps)
    assert steps_of(run, "range(1,4)") == cached


@pytest.mark.parametrize(
    "spec, name, sentence",
    [
        ("skip-dit", "dit", "^skip-dit brings the current input .* long skips: DiT has no long skips$"),
        ("skip-dit", "mmdit", "MMDiT has no long skips$"),
        ("skip-dit:blocks=3", "u-vit", "^skip-dit runs 3 blocks at either end, and this model has 5: nothing is left"),
        ("skip-dit:blocks=0", "u-vit", "^blocks is a whole number of at least 1"),
        ("skip-dit:low=0.7,high=0.05", "u-vit", "^the window between the noise levels 0.7 and 0.05 is empty"),
    ],
)
def test_bad_input(spec: str, name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        bound(spec, toys.make(name))
