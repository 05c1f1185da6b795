"""Fewer steps: the sampler's own run with another number of steps, shown in the result, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ditloom
from ditloom.caches.fewer_steps import FewerSteps
from ditloom.contracts.errors import UserError
from tests.cli.tiny import tiny

DRAW: dict[str, Any] = {"seed": 3, "sampler": "euler", "steps": 10}


@pytest.mark.parametrize("spec, steps", [("steps=4", 4), ("share=0.5", 5), ("share=0.33", 3), ("share=0.01", 1)])
def test_it_is_the_same_run_in_fewer_steps(spec: str, steps: int) -> None:
    model = tiny()
    result = model.generate([0, 1], using=[f"fewer-steps:{spec}"], **DRAW)
    plain = model.generate([0, 1], **{**DRAW, "steps": steps})
    assert torch.equal(result.latents, plain.latents)
    assert result.settings == plain.settings and result.settings["steps"] == steps
    assert result.report.macs == plain.report.macs


def test_beside_a_cache_and_attached() -> None:
    model = tiny()
    both = model.generate([0], using=["fora", "fewer-steps:steps=7"], **DRAW)
    assert torch.equal(both.latents, model.generate([0], using=["fora"], **{**DRAW, "steps": 7}).latents)
    with ditloom.using(model, "fewer-steps:steps=7"):
        assert model.generate([0], using=["fora"], **DRAW).settings["steps"] == 7
    assert model.generate([0], **DRAW).settings["steps"] == 10


def test_once_by_one_step() -> None:
    result = tiny().generate([0], using=["fewer-steps"], **{**DRAW, "steps": 1})
    assert result.settings["steps"] == 1


def test_bad_input() -> None:
    model = tiny()
    with pytest.raises(UserError, match="^fewer-steps takes 20 steps where 10 are asked for: that is not fewer$"):
        model.generate([0], using=["fewer-steps:steps=20"], **DRAW)
    with pytest.raises(UserError, match="^fewer-steps and fewer-steps cannot run together: both change steps$"):
        model.generate([0], using=["fewer-steps:steps=4", "fewer-steps:share=0.5"], **DRAW)
    with pytest.raises(UserError, match="^share is a share in 0..1; got 3$"):
        FewerSteps(share=3)
    with pytest.raises(UserError, match="^fewer-steps needs a number of steps or a share"):
        FewerSteps(share=0)
