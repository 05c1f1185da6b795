"""Names, specs and errors of processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.registries import PROCESSES
from ditloom.contracts.settings import parse
from ditloom.processes import process
from ditloom.processes.linear import Linear


def test_every_process_is_registered_under_its_file_name():
    assert PROCESSES.names() == ["discrete-vp", "edm", "gvp", "joint", "linear", "vp"]
    for name in PROCESSES.names():
        assert PROCESSES.info(name).name == name and PROCESSES.get(name).__doc__


def test_listing_processes_does_not_import_torch():
    code = (
        "import sys; from ditloom.contracts.registries import PROCESSES, SAMPLERS; PROCESSES.names(); SAMPLERS.names()"
    )
    assert subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"]).returncode == 0


def test_specs():
    assert process("linear:predicts=x0,direction=0.5") == Linear(predicts="x0", direction=0.5)
    assert process({"name": "linear", "weight": "snr"}) == Linear(weight="snr")
    assert process(Linear()) == Linear()
    assert parse("a:b-c=1.5, d=text") == ("a", {"b_c": 1.5, "d": "text"})


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("liner", UnknownName, "did you mean 'linear'"),
        ("linear:predict=v", UnknownName, "did you mean 'predicts'"),
        ("linear:predicts", UserError, "expected name:key=value"),
        ({"predicts": "v"}, UserError, "a mapping with a 'name'"),
        ("edm:sigma_max=-1", UserError, "sigma_max must be above 0, got -1"),
        ("discrete-vp:schedule=cosin", UnknownName, "did you mean 'cosine'"),
        ("vp:variance=medium", UnknownName, "unknown variance 'medium'"),
    ],
)
def test_mistakes_are_named(spec, error, message):
    with pytest.raises(error, match=message):
        process(spec)
