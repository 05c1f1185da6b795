"""The guidance gate against a loop over predictions."""

from __future__ import annotations

import pytest
import torch

from ditloom.contracts.errors import UserError
from tests.caches.acting import bound, drawn, steps_of
from tests.sites import toys
from tests.sites.driving import by_run, follow, moved, same, start


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("spec, computed", [("start=3", (0, 1, 2)), ("start=2,interval=3", (0, 1, 2, 5))])
def test_against_a_loop(spec: str, computed: tuple[int, ...], batched: bool) -> None:
    model, x, gap = toys.make("mmdit"), toys.latent(), torch.zeros(())
    plain = start(model)
    with torch.no_grad():
        for s in range(6):
            out = plain.predict(x, plain.schedule.clock(s))
            if s in computed:
                gap = out["uncond"] - out["cond"]
            x = moved(x, {**out, "uncond": out["cond"] + gap})
    got, run = drawn(model, f"guidance-gate:{spec}", batched=batched)
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)
    assert run.report.forwards == 6 + len(computed)
    assert steps_of(run, "branch(uncond)") == [s for s in range(6) if s not in computed]


@pytest.mark.parametrize(
    "steps, first, alone", [(10, "0.5", 5), (10, "7", 3), (1, "0.5", 0), (2, "0", 1), (2, "0.5", 1)]
)
def test_forwards_saved(steps: int, first: str, alone: int) -> None:
    """Never on the first step, of which there is no difference yet."""
    _, run = drawn(toys.make("dit"), f"guidance-gate:start={first}", steps=steps)
    assert run.report.forwards == 2 * steps - alone
    assert run.report.macs < run.report.full_macs or not alone


def test_a_gate_after_the_end_changes_no_bit() -> None:
    model = toys.make("mmdit")
    assert same(drawn(model, "guidance-gate:start=1.0")[0], by_run(model)[0])


def test_it_is_exact_at_rest() -> None:
    model = toys.make("dit")
    _, seen = follow(start(model, [bound("guidance-gate:start=1", model)]), still=True)
    torch.testing.assert_close(seen[-1]["uncond"], seen[0]["uncond"], atol=1e-6, rtol=1e-6)


def test_a_run_without_guidance_is_refused() -> None:
    model = toys.make("dit")
    run = start(model, [bound("guidance-gate", model)], branches=("cond",))
    with pytest.raises(UserError, match="^this run has no branch 'uncond': it has cond$"):
        follow(run)


def test_bad_input() -> None:
    with pytest.raises(UserError, match=r"^start is a count of at least 0 or a share in 0.0..1.0; got 1.5$"):
        bound("guidance-gate:start=1.5", toys.make("dit"))
