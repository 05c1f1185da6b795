"""The arithmetic of a comparison on constructed data: front, matching, picking, writing of sets, verdicts."""

import math
import random

import pytest

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.plan import Action
from ditloom.contracts.site import OUTPUT, Site, block_range, branch
from ditloom.measure.comparison.candidates import Candidate, candidates, fewer_steps, swept
from ditloom.measure.comparison.choice import Budget, Quality, pick
from ditloom.measure.comparison.front import matched_steps, pareto
from ditloom.measure.comparison.heat import Heat, Recorder, heat
from ditloom.measure.comparison.presets import preset
from ditloom.measure.comparison.row import Row, Score
from ditloom.measure.comparison.verdict import looks


def row(name, speedup=1.0, macs=100, **scores):
    methods = () if name == "plain" else tuple(name.split(" + "))
    times = {"times": (1.0,), "plain_times": (speedup,)} if methods else {"times": (1.0,)}
    return Row(name=name, methods=methods, macs=macs, scores={k: Score(v) for k, v in scores.items()}, **times)


def test_the_front_holds_what_nothing_beats():
    assert pareto([(1.0, 50.0), (2.0, 40.0), (1.5, 30.0), (2.0, 35.0), (3.0, 40.0), (0.5, 50.0)]) == [4, 0]
    assert pareto([]) == [] and pareto([(1.0, 1.0), (1.0, 1.0)]) == [0]
    draw = random.Random(0)
    for _ in range(200):
        points = [(draw.randrange(6), draw.randrange(6)) for _ in range(draw.randrange(1, 12))]
        front = [points[i] for i in pareto(points)]
        assert sorted(front) == sorted({p for p in points if not _beaten(p, points)})
        assert front == sorted(front, reverse=True)


def _beaten(point, points):
    return any(q != point and q[0] >= point[0] and q[1] >= point[1] for q in points)


def test_the_control_takes_at_least_as_many_macs_and_the_fewest_steps():
    once = lambda n: n  # noqa: E731
    assert matched_steps(450, 1000, 10, once) == 5
    assert matched_steps(500, 1000, 10, once) == 5
    assert matched_steps(501, 1000, 10, once) == 6
    assert matched_steps(1, 1000, 10, once) == 1
    assert matched_steps(900, 1000, 10, once) == 9
    assert matched_steps(901, 1000, 10, once) is None
    assert matched_steps(1100, 1000, 10, once) is None
    twice = lambda n: 2 * n - 1  # noqa: E731
    assert matched_steps(500, 1900, 10, twice) == 3
    for macs in range(1, 1000, 7):
        n = matched_steps(macs, 1000, 30, once)
        assert n is None or (n * 1000 / 30 >= macs - 1e-6 and (n == 1 or (n - 1) * 1000 / 30 < macs))


ROWS = [
    row("plain", psnr=100.0),
    row("a", 1.5, psnr=40.0, lpips=0.01),
    row("b", 2.2, psnr=28.0, lpips=0.2),
    row("c", 2.1, psnr=31.0, lpips=0.1),
    row("d", 3.0, psnr=20.0, lpips=0.5),
]


def test_a_budget_takes_the_best_quality_within_it():
    assert pick(ROWS, Budget.read("2x"), None).best.name == "c"
    assert pick(ROWS, Budget.read("1.2"), None).best.name == "a"
    found = pick(ROWS, Budget.read("4X"), None)
    assert found.best is None and found.nearest.name == "d" and found.wanted == "at least 4x as fast"


def test_a_floor_of_quality_takes_the_fastest_above_it():
    assert pick(ROWS, None, Quality.read("psnr>30")).best.name == "c"
    assert pick(ROWS, None, Quality.read("lpips < 0.05")).best.name == "a"
    found = pick(ROWS, None, Quality.read("psnr>=60"))
    assert found.best is None and found.nearest.name == "a"


def test_both_limits_hold_together():
    both = pick(ROWS, Budget.read("2x"), Quality.read("psnr>25"))
    assert both.best.name == "b"
    none = pick(ROWS, Budget.read("2x"), Quality.read("psnr>35"))
    assert none.best is None and none.nearest.name == "a"
    assert none.wanted == "at least 2x as fast and psnr > 35"


def test_refused_sets_and_missing_scores_are_never_picked():
    refused = Row(name="x", methods=("x",), refused="no")
    assert pick([refused, row("y", 9.0)], Budget.read("2x"), Quality.read("psnr>1")).best is None
    assert pick([], Budget.read("2x"), None).nearest is None


@pytest.mark.parametrize("text", ["1x", "0.5x", "fast", "", "nan", "inf", "-2x", "2xx"])
def test_nonsense_budgets_are_refused(text):
    with pytest.raises(UserError, match="--budget is a speed-up above 1"):
        Budget.read(text)


@pytest.mark.parametrize("text", ["psnr", "psnr=30", "psnr>", "psnr>much", ">30", "psnr>nan"])
def test_nonsense_floors_are_refused(text):
    with pytest.raises(UserError, match="--quality is written as"):
        Quality.read(text)


def test_metrics_have_a_nearest_name_and_a_direction():
    with pytest.raises(UnknownName, match="did you mean 'psnr'"):
        Quality.read("psrn>30")
    with pytest.raises(UserError, match="psnr is better when it is higher: write psnr>30"):
        Quality.read("psnr<30")
    with pytest.raises(UserError, match="write lpips<0.1"):
        Quality.read("lpips>0.1")


def test_sweeps_are_cartesian():
    assert swept("a:x=1|2,y=3|4") == ["a:x=1,y=3", "a:x=1,y=4", "a:x=2,y=3", "a:x=2,y=4"]
    assert swept("a:x=1|2 + b + c:z=1e-3|5") == [
        "a:x=1 + b + c:z=1e-3",
        "a:x=1 + b + c:z=5",
        "a:x=2 + b + c:z=1e-3",
        "a:x=2 + b + c:z=5",
    ]
    assert swept("a") == ["a"]
    with pytest.raises(UserError, match="has an empty place"):
        swept("a:x=1|")


def test_sets_are_read_once_whatever_their_order():
    found = candidates(
        ["fora:interval=2 + guidance-gate", "guidance-gate+fora:interval=2", "fora"], ["fora:interval=2|3"]
    )
    assert [c.name for c in found] == ["fora:interval=2 + guidance-gate", "fora", "fora:interval=2", "fora:interval=3"]
    assert found[0].names == ("fora", "guidance-gate")
    assert found[0].flags == "--using fora:interval=2 --using guidance-gate"
    assert Candidate(("pab:mlp_at=(1,2)",)).flags == "--using 'pab:mlp_at=(1,2)'"
    stack = candidates(["preset:delta-then-fora + guidance-gate"])[0]
    assert stack.name == "delta-dit:end=0.5 + fora:start=0.5 + guidance-gate"
    assert fewer_steps(5).is_control and fewer_steps(5).flags == "--using fewer-steps:steps=5"


def test_wrong_sets_are_refused_with_the_nearest_name():
    with pytest.raises(UnknownName, match="did you mean 'fora'"):
        candidates(["fora:interval=2", "forra"])
    with pytest.raises(UnknownName, match="did you mean 'interval'"):
        candidates(["fora:intervall=2"])
    with pytest.raises(UserError, match="interval"):
        candidates(["fora:interval=often"])
    with pytest.raises(UserError, match="nothing to compare"):
        candidates([])
    with pytest.raises(UserError, match="names no method"):
        candidates([" + "])
    with pytest.raises(UnknownName, match="did you mean 'gated-dbcache'"):
        candidates(["preset:gated-dbcach"])
    with pytest.raises(UnknownName, match="did you mean 'caches'"):
        preset("cache")


def test_the_preset_holds_every_cache_and_nothing_unknown():
    from ditloom.contracts.registries import METHODS

    found = candidates(preset=preset("caches"))
    named = {name for candidate in found for name in candidate.names}
    caches = {n for n in METHODS.names() if METHODS.info(n).facts.get("family") == "caches"} - {"fewer-steps"}
    assert caches <= named and not any(c.is_control for c in found)


def test_a_new_cache_of_the_running_program_is_in_the_preset(monkeypatch):
    from ditloom.contracts.registries import METHODS
    from ditloom.contracts.registry import register
    from tests.measure.comparing import EveryOther

    monkeypatch.setattr(METHODS, "_local", dict(METHODS._local))
    METHODS.add(register("every-other", family="caches")(EveryOther))
    assert "every-other" in preset("caches")


def test_likeness_in_words_falls_with_psnr():
    words = [looks(value) for value in (100, 40, 39.9, 32, 26, 20, 5)]
    assert words[0] == words[1] == "indistinguishable by eye" and words[2] == words[3] == "nearly identical"
    assert len(set(words)) == 5


def test_values_are_written_as_people_read_them():
    from ditloom.measure.comparison.columns import COLUMNS

    shown = {column.key: column.shown for column in COLUMNS}
    assert (shown["psnr"](100.0), shown["psnr"](33.25), shown["speedup"](2.0)) == ("equal", "33.2 dB", "2.00x")
    assert (shown["share_saved"](-0.001), shown["share_saved"](-0.02), shown["margin"](0.4)) == (
        "0 %",
        "-2 %",
        "+0.4 dB",
    )
    assert (shown["held_bytes"](5e5), shown["psnr"](None)) == ("0.50 MB", "")


def test_speed_is_the_median_of_turns_taken_beside_the_plain_run():
    r = Row(name="a", methods=("a",), times=(1.0, 2.0, 1.0), plain_times=(2.0, 6.0, 2.2))
    assert r.speedup == pytest.approx(2.2) and r.spread == (2.0, 3.0) and r.seconds == 1.0
    assert row("plain").speedup == 1.0


def test_a_row_survives_json():
    import json

    kept = Row(
        name="a",
        methods=("a", "b"),
        steps=2,
        times=(0.5,),
        plain_times=(1.0,),
        macs=5,
        scores={"psnr": Score(30.0, 0.5), "lpips": Score(0.1)},
        absent={"frechet": "why"},
        heat=Heat(((0.0, 1.0),), (".r",), {"uncond": "."}),
        notes=("n",),
    )
    assert Row.from_dict(json.loads(json.dumps(kept.to_dict()))) == kept


def test_the_map_says_what_happened_where():
    class Past:
        depth = 2

    from types import SimpleNamespace

    from ditloom.sites.codecs import HOLD

    recorder = Recorder()
    forecast, gate = block_range(1, 3), branch("uncond")
    attention = Site("attn", block=0)

    def planned(site, predictor):
        return SimpleNamespace(site=site, control=SimpleNamespace(predictor=predictor))

    listed = [
        [],
        [planned(attention, HOLD), planned(forecast, Past()), planned(gate, HOLD)],
        [planned(OUTPUT, HOLD)],
        [],
    ]
    program = SimpleNamespace(steps=[SimpleNamespace(planned=lambda s=s: iter(s)) for s in listed])
    recorder.visit(attention, Action.COMPUTE)
    recorder.step = 1
    for site in (attention, forecast, gate):
        recorder.visit(site, Action.REUSE)
    recorder.cells |= {(1, 0): 0.4, (1, 1): 1.0, (1, 2): 1.0}
    recorder.step = 2
    recorder.visit(OUTPUT, Action.REUSE)
    recorder.cells[2, -1] = 1.0
    recorder.step = 3
    recorder.visit(block_range(2, 3), Action.SKIP)
    recorder.visit(attention, Action.ROWS)
    recorder.cells |= {(3, 2): 1.0, (3, 0): 0.2}
    found = heat(recorder, program, 4, 3, ("cond", "uncond"))
    assert found.kinds == ("...", "rpp", "rrr", "w.x")
    assert found.shares == ((0.0, 0.0, 0.0), (0.4, 1.0, 1.0), (1.0, 1.0, 1.0), (0.2, 0.0, 1.0))
    assert found.branches == {"cond": "....", "uncond": ".r.."}
    per_step = [0, 0.5 + 0.5 * 0.8, 1, 0.4]
    assert found.reused == pytest.approx(math.fsum(per_step) / 4)
    assert recorder.count("attn", Action.REUSE) == 1
