"""`estimate --using`: what is planned to the last MAC and byte, what is decided within bounds that can be reached."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from ditloom.cli.rehearsal import rehearsed
from ditloom.cli.wanted import settings_of
from ditloom.model import Model
from ditloom.sites.report import Report
from tests.caches.every import ALL, LEARNED, ON
from tests.cli.tiny import tiny

GUIDED = {"steps": 6, "guidance": "cfg:scale=2.0,end=0.9", "sampler": "euler"}
OTHER = {"skip-dit": "it needs a Skip-DiT", **dict.fromkeys(LEARNED, "a training makes its scores")}
SETTINGS = {**ON, "fewer-steps": "steps=4", "mixcache": "kappa=1e9,stable=1,last=1"}
SPECS = [f"{key}:{SETTINGS[key]}" if key in SETTINGS else key for key in ALL if key not in OTHER]
DECIDING = ("adacache", "dbcache", "dbprune", "fbcache", "mixcache", "teacache")


@cache
def model() -> Model:
    """Four blocks."""
    plain = tiny().config()
    return tiny(backbone={**plain["backbone"], "depth": 4})


def both(*using: str, count: int = 2, **changes: Any) -> tuple[list[Report], Report]:
    """What is rehearsed (the least reuse first), and what is reported of the same drawing."""
    settings = settings_of(model(), **{"size": None, **GUIDED, **changes}, using=using)
    batch = model().batch([None] * count, range(count), settings, None, using)
    return rehearsed(model(), batch), model().generate([None] * count, **settings).report


def costs(report: Report) -> tuple[int, int, int]:
    return report.macs, report.forwards, report.bytes_held


@pytest.mark.parametrize("spec", SPECS)
def test_every_cache(spec: str) -> None:
    found, report = both(spec)
    assert (len(found) == 2) == (spec.partition(":")[0] in DECIDING)
    if len(found) == 1:
        assert costs(found[0]) == costs(report)
    assert found[-1].macs <= report.macs <= found[0].macs
    assert report.bytes_held <= max(one.bytes_held for one in found)


REACHED = {
    "dbcache:first=1,warmup=2,threshold={}": (1e-9, 0.999999),
    "dbprune:first=1,warmup=2,threshold={}": (1e-9, 1e9),
    "fbcache:max_consecutive=2,threshold={}": (1e-9, 1e9),
    "teacache:fit=identity,threshold={}": (1e-9, 1e9),
    "teacache:fit=flux,threshold={}": (1e-9, 1e9),
    "adacache:codebook=((1e9,{}),)": (1, 4),
    "mixcache:stable=1,interval=2,grains=step,tau={}": (1e-9, 1e9),
}


@pytest.mark.parametrize("spec", REACHED)
def test_both_ends_are_reached(spec: str) -> None:
    """By a threshold below every difference, and by one above."""
    (_, least), (found, most) = (both(spec.format(value)) for value in REACHED[spec])
    assert [one.macs for one in found] == [least.macs, most.macs] and most.macs < least.macs


def test_other_samplers_and_guidance() -> None:
    """Stages of a solver, branches that are not always asked for, steps without a forward."""
    for changes in ({"sampler": "heun"}, {"guidance": "cfg-zero-star:scale=2,zero_steps=2"}):
        (found,), report = both("fora:interval=2", "guidance-gate:start=0.5", **changes)
        assert costs(found) == costs(report)


def test_on_the_command_line(ditloom: Any, refused: Any, model_folder: Any) -> None:
    asked = ("--model", model_folder, "--count", 5, "--batch-size", 2, "--steps", 6, "--using")
    planned = ditloom("estimate", *asked, "fora:interval=2", "--json").document
    drawn = ditloom("generate", *asked, "fora:interval=2", "--json", "--out", "a").document["report"]
    assert (planned["macs"], planned["forwards"], planned["held"]) == tuple(
        drawn[name] for name in ("macs", "forwards", "bytes_held")
    )
    assert planned["macs"] < planned["plain_macs"] == drawn["full_macs"] and planned["between"] is None
    assert planned["memory"] == planned["weights"] + planned["activations"] + planned["held"]
    decided = ditloom("estimate", *asked, "fbcache", "--json", "--probe", 1).document
    fast, slow = decided["between"]["seconds"]
    assert decided["macs"] is decided["seconds"] is decided["images_per_second"] is None and 0 < fast <= slow
    told = ditloom("estimate", *asked, "fbcache", "--probe", 0).out
    assert "what happens depends on what the run sees" in told and "held between steps" in told
    assert "of what it takes without methods" in told


def test_what_is_refused(refused: Any, model_folder: Any) -> None:
    asked = ("estimate", "--model", model_folder, "--using")
    assert "unknown method 'forra': did you mean 'fora'" in refused(*asked, "forra")
    assert "magcache needs a calibration of this model" in refused(*asked, "magcache")
    both_at_once = refused(*asked, "fora:interval=2", "--using", "taylorseer:interval=2", "--steps", 6)
    assert "fora and taylorseer cannot run together" in both_at_once
    assert "dbcache always computes the first 8" in refused(*asked, "dbcache")


@pytest.mark.slow
def test_of_a_model_with_an_autoencoder(ditloom: Any) -> None:
    found = ditloom("estimate", "--model", "emoji", "--steps", 5, "--using", "fora:interval=2", "--probe", 0, "--json")
    assert found.code == 0 and found.document["macs"] < found.document["plain_macs"]
