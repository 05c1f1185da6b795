"""Runs over families whose blocks change streams, skip images or read text of their own: still runs stay the same."""

from __future__ import annotations

import pytest
import torch

from ditloom.contracts.clock import Schedule
from ditloom.contracts.plan import Action
from ditloom.sites.codecs import DELTA, VALUE
from ditloom.sites.run import Run
from tests.backbones.tiny import inputs, make, of_kind
from tests.sites.scripted import Planned

LEVEL = 0.6


@pytest.mark.parametrize("name", ["flux", "hidream", "dense2moe-blocks", "dit-moe", "dit-air-lite", "li-dit-two"])
@torch.no_grad()
def test_reuse_in_a_still_run_changes_nothing_and_costs_less(name: str) -> None:
    """A sub-module, the whole stack, all but its first block, and its last block, each reused in the second step."""
    backbone = make(name)
    x, _, condition = inputs(backbone)
    blocks, native = len(of_kind(backbone)), float(backbone.preset.time.native(torch.tensor(LEVEL)))
    schedule = Schedule((LEVEL, LEVEL, 0.0), (native, native), ("cond",))
    plain = backbone(x, torch.full((3,), LEVEL, dtype=torch.float64), condition)
    costs = []
    for site in ("attn(1)", "mlp(1)", f"range(0,{blocks})", f"range(1,{blocks})", f"range({blocks - 1},{blocks})"):
        handler = Planned({site: [Action.COMPUTE, Action.REUSE]}, codec=DELTA if "range" in site else VALUE)
        run = Run(backbone, [handler], schedule=schedule, conditions={"cond": condition})
        for step in range(2):
            out = run.predict(x, schedule.clock(step))["cond"]
            torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
        costs.append(run.report.macs)
    whole, rest, last = costs[2:]
    assert whole < rest < last
    assert max(costs[:2]) > rest
