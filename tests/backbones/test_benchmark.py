"""The benchmark of families: which it times, what it keeps, and that its numbers are of what it says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from benchmarks import families, family_turns
from benchmarks.family_configs import CONFIGS
from benchmarks.peers import PEERS
from ditloom.contracts.registries import BACKBONES
from tests.backbones.tiny import TINY

NUMBERS = {
    "parameters": 1,
    "gmacs": 2.0,
    "tokens": 3,
    "times": {"eager": {"img/s": 4.0, "of floor": 0.51234}, "training": {"img/s": 1.0, "of floor": 0.5}},
}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A measurement that takes no time, and the configurations it was asked for."""
    asked = []
    monkeypatch.setattr(families, "FOLDER", tmp_path)
    monkeypatch.setattr(families.family_turns, "measured", lambda config, peer: asked.append(config) or NUMBERS)
    return asked


def test_every_family_has_a_configuration_to_time() -> None:
    assert list(CONFIGS) == BACKBONES.names()
    assert all(config.family == name for name, config in CONFIGS.items())
    assert PEERS.keys() <= CONFIGS.keys()


def test_kept_numbers_are_taken_again_only_when_asked_or_when_something_changed(measured, monkeypatch) -> None:
    first = families.row_of("dit")
    assert families.row_of("dit") == first
    assert len(measured) == 1
    families.row_of("dit", again=True)
    assert len(measured) == 2
    monkeypatch.setattr(family_turns, "RUNS", family_turns.RUNS + 1)
    assert families.row_of("dit")["protocol"] != first["protocol"]
    monkeypatch.setitem(families.CONFIGS, "dit", CONFIGS["sit"])
    families.row_of("dit")
    assert [config.family for config in measured] == ["dit", "dit", "dit", "sit"]


def test_a_failure_is_told_and_the_rest_is_measured(measured, monkeypatch, capsys) -> None:
    def failing(config, peer):
        if config.family == "dit":
            raise ValueError("no such luck")
        return NUMBERS

    monkeypatch.setattr(families.family_turns, "measured", failing)
    assert families.main(["dit", "sit"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["failed"] == {"dit": "ValueError: no such luck"}
    assert told["families"]["sit"]["times"] == NUMBERS["times"]


def test_the_evidence_is_of_all_that_is_kept(measured, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(families, "EVIDENCE", tmp_path / "speeds.yaml")
    families.main(["sit"])
    assert families.main(["--evidence", "dit"]) == 0
    assert list(yaml.safe_load((tmp_path / "speeds.yaml").read_text())["speed"]["families"]) == ["dit", "sit"]
    assert families.main(["--evidence", "--markdown"]) == 0
    speed = yaml.safe_load((tmp_path / "speeds.yaml").read_text())["speed"]
    assert list(speed["families"]) == BACKBONES.names()
    assert speed["families"]["dit"]["times"]["eager"] == {"img/s": 4.0, "of floor": 0.5123}


@pytest.mark.slow
def test_numbers_of_a_tiny_family_beside_its_peer(monkeypatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr(family_turns, "RUNS", 1)
    row = family_turns.measured(replace(TINY["dit"], depth=1, learn_sigma=False, frequency_shift=1), PEERS["dit"])
    assert set(row["times"]) == {"diffusers", "cast", "eager", "frozen", "training", "diffusers training"}
    assert 0 < row["times"]["eager"]["of floor"] < 1
    assert row["times"]["frozen"]["over diffusers"] > 0
