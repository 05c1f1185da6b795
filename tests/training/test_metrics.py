"""The metrics log survives torn lines and forgets what a resume undid."""

import json
import os

import pytest

from ditloom.contracts.errors import UserError
from ditloom.training.metrics import MetricsLog, read_metrics, series


def test_values_read_back(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.write(8, loss=0.5, rate=1e-4)
    log.write(16, loss=float("nan"))
    log.close()
    records = read_metrics(log.path)
    assert records == [{"images": 8, "loss": 0.5, "rate": 1e-4}, {"images": 16, "loss": None}]
    assert series(records, "loss") == ([8], [0.5])


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_torn_last_line_is_passed_over_and_the_next_one_is_whole(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(8, loss=0.5)
    log.write(16, loss=0.25)
    log.close()
    os.truncate(path, path.stat().st_size - cut)
    log = MetricsLog(path)
    log.write(24, loss=0.125)
    log.close()
    kept = [8, 16, 24] if cut == 1 else [8, 24]
    assert [record["images"] for record in read_metrics(path)] == kept


def test_a_resume_undoes_what_came_after_and_appends_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for images in (8, 16, 24):
        log.write(images, loss=images)
    log.close()
    before = path.read_bytes()
    log = MetricsLog(path, resumed_at=16)
    log.write(24, loss=-1)
    log.close()
    assert path.read_bytes().startswith(before)
    assert series(read_metrics(path), "loss") == ([8, 16, 24], [8, 16, -1])


def test_every_line_is_strict_json_and_garbage_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\x00\x00\n[1]\nnonsense\n")
    log = MetricsLog(path)
    log.write(8, loss=float("inf"))
    log.close()

    def refuse(name):
        raise AssertionError(name)

    json.loads(path.read_bytes().splitlines()[-1], parse_constant=refuse)
    assert read_metrics(path) == [{"images": 8, "loss": None}]


def test_a_missing_log_is_empty_and_an_impossible_place_is_one_sentence(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not open"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl")


def test_a_full_disk_is_one_sentence():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    from pathlib import Path

    log = MetricsLog(Path("/dev/full"))
    with pytest.raises(UserError, match="No space left"):
        log.write(8, loss=0.5)
