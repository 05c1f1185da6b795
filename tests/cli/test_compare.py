"""`compare`: a table, comparison.json, the page; what is refused; what survives an interruption."""

import json
import re
import shlex
from pathlib import Path

import pytest

from ditloom.cli.commands.compare import Compare
from ditloom.cli.flags import parsed
from ditloom.contracts.errors import UserError
from ditloom.measure.comparison.ledger import Ledger

TINY = ("--steps", 4, "--repeats", 1, "--count", 2, "--extractor", "pixels")


@pytest.fixture
def compare(ditloom, model_folder):
    return lambda *arguments: ditloom("compare", "--model", model_folder, *TINY, *arguments)


def test_a_table_and_a_page(compare, tmp_path):
    ended = compare("--sets", "fora:interval=2", "fora:interval=2 + guidance-gate", "dbcache", "--out", "run")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0].split()[:2] == ["Set", "Speed-up"] and lines[1].startswith("plain ")
    assert any(line.startswith("fora:interval=2 + guidance-gate ") for line in lines)
    assert any(line.startswith("fewer-steps:steps=") for line in lines)
    assert any(line.startswith("dbcache: dbcache always computes the first 8") for line in lines)
    assert lines[-2:] == ["run/comparison.json", "run/comparison.html"]
    assert "left" in ended.err and "compare 100 %" in ended.err
    kept = json.loads((tmp_path / "run/comparison.json").read_text(encoding="utf-8"))
    assert f"protocol {kept['protocol']['hash']}" in lines
    assert {row["name"] for row in kept["rows"]} >= {"plain", "fora:interval=2", "dbcache"}
    assert (tmp_path / "run/comparison.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_json_is_one_document_and_a_second_run_only_reads(compare, monkeypatch):
    first = compare("--sweep", "fora:interval=2|3", "--sets", "fora:interval=2", "--json", "--out", "run").document
    named = [row["name"] for row in first["rows"] if not row["control"]]
    assert named == ["plain", "fora:interval=2", "fora:interval=3"]
    assert first["rows"][1]["flags"] == "--using fora:interval=2" and first["answer"]
    monkeypatch.setattr(Ledger, "_step", lambda *_: pytest.fail("drawn again"))
    again = compare("--sweep", "fora:interval=2|3", "--sets", "fora:interval=2", "--json", "--out", "run").document
    assert again == first


def test_ctrl_c_loses_nothing(compare, monkeypatch):
    kept = Ledger._step

    def stop(self, name):
        if name.startswith("delta-dit"):
            raise KeyboardInterrupt
        kept(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_step", stop)
        ended = compare("--sets", "fora:interval=2", "delta-dit:interval=2", "--out", "run")
    assert ended.code == 130 and "measured so far are in run; the same command goes on there" in ended.err
    drawn = set()
    monkeypatch.setattr(Ledger, "_step", lambda self, name: drawn.add(name) or kept(self, name))
    assert compare("--sets", "fora:interval=2", "delta-dit:interval=2", "--out", "run").code == 0
    assert "delta-dit:interval=2" in drawn and not drawn & {"plain", "fora:interval=2"}


def test_the_pick_comes_with_the_flags_to_use_it(compare, ditloom, model_folder):
    ended = compare("--sets", "fora:interval=2", "--quality", "psnr>5", "--out", "run")
    lines = ended.out.splitlines()
    command = next(line for line in lines if line.startswith("ditloom generate "))
    assert any(line.startswith("Best of what is psnr > 5: ") for line in lines)
    assert command.startswith(f"ditloom generate --model {model_folder} --steps 4 ")
    drawn = ditloom(*command.split()[1:], "--out", "drawn", "bee", "--json").document["settings"]
    told = json.loads(Path("run/comparison.json").read_text())["protocol"]
    assert [drawn[name] for name in ("steps", "sampler", "guidance")] == [
        told[name] for name in ("steps", "sampler", "guidance")
    ]
    none = compare("--sets", "fora:interval=2", "--budget", "900x", "--out", "run")
    assert none.code == 0 and "No set is at least 900x as fast. The nearest is " in none.out


def test_the_preset_runs_and_places_the_control(compare):
    found = compare("--preset", "caches", "--json", "--out", "run").document
    rows = {row["name"]: row for row in found["rows"]}
    assert {f"fewer-steps:steps={n}" for n in (1, 2, 3)} <= set(rows)
    named = {method.split(":")[0] for row in found["rows"] for method in row["methods"]}
    assert {"fora", "delta-dit", "fbcache", "teacache", "guidance-gate", "pab"} <= named
    refused = [row["refused"] for row in found["rows"] if row["refused"]]
    assert all("\n" not in sentence and not sentence.startswith("it failed") for sentence in refused)


def test_mistakes_are_one_sentence(refused, model_folder):
    def said(*arguments):
        return refused("compare", "--model", model_folder, *TINY, *arguments)

    assert "nothing to compare: give --sets" in said()
    assert "unknown method 'forra': did you mean 'fora'" in said("--sets", "forra")
    assert "did you mean 'interval'" in said("--sets", "fora:intervl=2")
    assert "unknown preset 'cashes': did you mean 'caches'" in said("--preset", "cashes")
    assert "unknown quality metric 'psrn': did you mean 'psnr'" in said("--sets", "fora", "--quality", "psrn>3")
    assert "--budget is a speed-up above 1, such as 2x; got '0.5x'" in said("--sets", "fora", "--budget", "0.5x")
    assert "--quality is written as psnr>30" in said("--sets", "fora", "--quality", "good")
    assert "unknown extractor 'pixel': did you mean 'pixels'" in said("--sets", "fora", "--extractor", "pixel")
    assert "--repeats must be at least 1; got 0" in said("--sets", "fora", "--repeats", 0)
    assert "unknown option --preste of compare: did you mean --preset" in said("--preste", "caches")
    assert "unknown model" in refused("compare", "--model", "emojo", "--sets", "fora")
    shared = said("--sets", "fora:interval=2", "--budget", "2x", "--seeds", "0,1", "--check-seeds", "1")
    assert "seed 1 is both searched and checked on" in shared


def test_another_protocol_in_the_same_folder_is_refused(compare, refused, model_folder):
    assert compare("--sets", "fora:interval=2", "--out", "run").code == 0
    said = refused("compare", "--model", model_folder, *TINY, "--seed", 5, "--sets", "fora:interval=2", "--out", "run")
    assert said == "ditloom: run holds a comparison with another seeds: name another folder with --out"


def test_python_has_the_same_door(model_folder):
    import ditloom

    model = ditloom.load(model_folder)
    found = ditloom.compare(model, ["fora:interval=2"], steps=4, repeats=1, inputs=["bee"], extractor="pixels")
    assert found.row("fora:interval=2").share_saved > 0 and found.front()
    with pytest.raises(UserError, match="'pab' is not in this comparison"):
        found.row("pab")


GUIDE = (Path(__file__).parents[2] / "docs" / "how-to-compare.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", re.findall(r"^ditloom compare .+$", GUIDE, re.M))
def test_the_guide_writes_commands_as_they_are(line):
    parsed(Compare, "compare", shlex.split(line)[2:])._check()


@pytest.mark.slow
def test_the_guide_writes_python_as_it_is(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    exec(compile(code, "how-to-compare.md", "exec"), {})
    assert "fewer-steps:steps=" in capsys.readouterr().out and Path("out/mine/comparison.html").is_file()
