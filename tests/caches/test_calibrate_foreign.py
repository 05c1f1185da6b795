"""A transformer of diffusers, watched for one run: its calibrations go to files that methods name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ditloom.caches.trace import Recorder
from ditloom.contracts.assets import write
from ditloom.contracts.errors import UserError
from ditloom.measure.calibrate import fitted
from tests.adapters.driving import attached, plain
from tests.adapters.tiny import CASES

pytest.importorskip("diffusers")


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_watch_keep_and_use(name: str, tmp_path: Path) -> None:
    case, recorder = CASES[name], Recorder()
    outputs, _ = attached(case, recorder)
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain(case), strict=True))
    trace, steps = recorder.trace(), len(case.times)
    assert trace.steps == steps and trace.growth[:, 1:].isfinite().all()
    files = {key: write(tmp_path / f"{key}.safetensors", fitted(key, trace)) for key in ("magcache", "taocache")}
    _, run = attached(case, f"magcache:calibration={files['magcache']},threshold=9")
    assert run.report.share_saved > 0.2
    _, run = attached(case, f"taocache:calibration={files['taocache']},start=0")
    assert run.report.share_saved > 0.1
    _, run = attached(case, "teacache:threshold=9")
    assert run.report.share_saved > 0.2
    with pytest.raises(UserError, match="magcache needs a calibration of this model: make one with"):
        attached(case, "magcache")
