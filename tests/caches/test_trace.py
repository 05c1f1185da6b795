"""What a watched run tells, against the same computed by hand."""

from __future__ import annotations

import pytest
import torch

from ditloom.caches.magcache import MagCache
from ditloom.caches.trace import Recorder, Trace, relative_change
from ditloom.contracts.method import mean_change
from tests.caches.deciding import LAYOUTS
from tests.sites import toys
from tests.sites.driving import STEPS, by_run, follow, same, start


@pytest.mark.parametrize("name", [*LAYOUTS, "u-vit"])
def test_a_watched_run_is_plain(name: str) -> None:
    model, recorder = toys.make(name), Recorder()
    x, run = by_run(model, [recorder])
    assert same(x, by_run(model)[0]) and run.report.bytes_held == 0
    trace = recorder.trace()
    assert trace.steps == STEPS and trace.output.shape == (2, STEPS)
    assert set(trace.indicators) == {"modulated_in", "time_embedding"}
    sites = [site.label for kind in ("attn", "mlp") for site in run.program.surface.sites(kind)]  # type: ignore[union-attr]
    assert {label for label in sites if not label.startswith("mlp_text")} == set(trace.sites)
    assert trace.output[:, 0].isnan().all() and trace.output[:, 1:].isfinite().all()
    assert trace.cosine[:, :2].isnan().all() and trace.cosine[:, 2:].isfinite().all()


def test_changes_by_hand() -> None:
    """Output, growth of the stack's change, and cosines of a run, computed from its predictions and borders."""
    model, recorder = toys.make("dit"), Recorder()
    seen = follow(start(model, [recorder]))[1]
    trace = recorder.trace()
    for s in range(1, STEPS):
        now, before = seen[s]["cond"], seen[s - 1]["cond"]
        assert trace.output[0, s] == pytest.approx(float(mean_change(now[:1], before[:1])), rel=1e-5)
    deltas = [torch.cat([(a[b] - z[b]).flatten(1) for b in a], 1) for z, a in zip(seen, seen[1:], strict=False)]
    for s in range(2, STEPS):
        cosine = torch.nn.functional.cosine_similarity(deltas[s - 1], deltas[s - 2], dim=1)
        torch.testing.assert_close(trace.cosine[:, s], cosine.double(), atol=1e-5, rtol=1e-5)
        ratio = deltas[s - 1].norm(dim=1) / deltas[s - 2].norm(dim=1)
        torch.testing.assert_close(trace.ratio[:, s], ratio.double(), atol=1e-5, rtol=1e-5)


def test_growth_is_that_of_the_stack() -> None:
    model, recorder = toys.make("dit"), Recorder(sites=False)
    residuals: list[torch.Tensor] = []
    original = model.run

    def watched(streams, context, *where):  # type: ignore[no-untyped-def]
        left = original(streams, context, *where)
        residuals.append((left["image"] - streams["image"])[:2])
        return left

    model.run = watched  # type: ignore[method-assign]
    by_run(model)
    model.run = original  # type: ignore[method-assign]
    by_run(model, [recorder])
    trace = recorder.trace()
    assert not trace.sites
    for s in range(1, STEPS):
        ratio = (residuals[s].norm(dim=-1) / residuals[s - 1].norm(dim=-1)).mean(1)
        torch.testing.assert_close(trace.growth[:, s], ratio.double(), atol=1e-4, rtol=1e-4)
    table = MagCache.from_trace(trace)["ratio"]
    assert table[0] == 1.0 and table[2] == pytest.approx(float(trace.growth[:, 2].mean()))


def test_batches_are_joined() -> None:
    model, both = toys.make("dit"), []
    for _ in range(2):
        recorder = Recorder(sites=False)
        by_run(model, [recorder])
        both.append(recorder.trace())
    joined = Trace.joined(both)
    assert joined.output.shape == (4, STEPS) and torch.equal(
        joined.output[:2].nan_to_num(), both[0].output.nan_to_num()
    )
    assert len(joined.pairs("modulated_in")[0]) == 4 * (STEPS - 1)


def test_relative_change_is_the_usual_measure_of_each_picture() -> None:
    a, b = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    expected = [float(mean_change(a[i], b[i])) for i in range(3)]
    assert relative_change(a, b).tolist() == pytest.approx(expected)
