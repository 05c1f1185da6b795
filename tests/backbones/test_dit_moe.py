"""What is special about DiT-MoE; routing itself is tested with its part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ditloom.backbones.dit_moe import PRESETS, DiTMoEConfig
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Handler, Tap
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.registries import PROCESSES
from ditloom.parts.experts import balance_loss
from ditloom.sites.run import Run
from tests.backbones.portrait import LATENT
from tests.backbones.tiny import inputs, make, planned

ACTIVE = {
    "DiT-MoE-S/2-8E2A": 71_807_264,
    "DiT-MoE-B/2-8E2A": 286_056_992,
    "DiT-MoE-XL/2-8E2A": 1_492_427_552 + 28 * 4 * 72,
    "DiT-MoE-G/2-16E2A": 3_181_198_624 + 40 * 4 * 88,
}


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters(name: str) -> None:
    with torch.device("meta"):
        backbone: Any = PRESETS[name].build()
    idle = sum(
        p.numel() * (block.mlp.router.weight.shape[0] - block.mlp.router.top_k) // block.mlp.router.weight.shape[0]
        for block in backbone.blocks
        for p in block.mlp.experts.parameters()
    )
    assert backbone.learned_parameters() - idle == ACTIVE[name]


def test_small_are_diffusion_models_and_large_rectified_flows() -> None:
    for name, config in PRESETS.items():
        large = name.startswith(("DiT-MoE-XL", "DiT-MoE-G"))
        settings = {k: v for k, v in config.process.items() if k != "name"}
        PROCESSES.get(config.process["name"])(**settings)
        assert config.flow == config.qk_norm == large
        assert config.time.native(torch.tensor(1.0)) == (1.0 if large else 999.0)


@torch.no_grad()
def test_a_flow_drops_the_second_half_of_its_outputs() -> None:
    flow = make("dit-moe-flow")
    x, t, condition = inputs(flow)
    full: Any = replace(flow.preset, flow=False).build().eval()
    full.load_state_dict(flow.state_dict(), strict=True)
    assert torch.equal(full(x, t, condition)[:, :4], flow(x, t, condition))


def test_balance_reaches_whoever_asks_the_plan() -> None:
    backbone = make("dit-moe")
    x, t, condition = inputs(backbone)
    _, kept = planned(backbone, x, t, condition, {i: (BlockPlan(keep=("balance",)), {}) for i in range(3)})
    loss = 0.01 * torch.stack([balance_loss(kept[i]["balance"]) for i in range(3)]).mean()
    loss.backward()
    assert all(bool(block.mlp.router.weight.grad.abs().sum() > 0) for block in backbone.blocks)


class Balance(Handler):
    """Taps what a balance loss is made of."""

    key = "balance"

    def __init__(self) -> None:
        self.seen: dict[int | None, torch.Tensor] = {}

    def taps(self, schedule: Any, surface: Any) -> Any:
        return [[Tap("balance", block=i, gradient=True) for i in range(surface.blocks)]] * schedule.steps

    def captured(self, tap: Tap, value: Any, clock: Any, rows: Any) -> None:
        self.seen[tap.block] = value


def test_a_tap_of_the_balance_gets_it_with_its_graph() -> None:
    from ditloom.contracts.clock import Schedule

    backbone = make("dit-moe")
    x, _, condition = inputs(backbone)
    schedule, handler = Schedule((0.5, 0.0), (499.0,), ("cond",)), Balance()
    run = Run(backbone, [handler], schedule=schedule, conditions={"cond": condition})
    out = run.predict(x, schedule.clock(0))["cond"]
    with torch.no_grad():
        torch.testing.assert_close(out, backbone(x, torch.full((3,), 0.5, dtype=torch.float64), condition))
    assert {i: tuple(v.shape) for i, v in handler.seen.items()} == {i: (3, 2, 4) for i in range(3)}
    sum(balance_loss(v) for v in handler.seen.values()).backward()  # type: ignore[union-attr]
    assert backbone.blocks[2].mlp.router.weight.grad is not None


def test_what_does_not_fit_is_said_at_construction() -> None:
    with pytest.raises(UserError, match="5 experts per token cannot be chosen among 4"):
        DiTMoEConfig(**LATENT, experts=4, top_k=5)


@torch.no_grad()
def test_experts_start_as_published() -> None:
    """Routers kaiming-uniform in (-1/sqrt(D), 1/sqrt(D)), every matrix of an expert xavier-uniform by itself."""
    block: Any = DiTMoEConfig(**LATENT, experts=4).build().blocks[0]
    width, hidden = 64, 256
    bound = (6 / (width + hidden)) ** 0.5
    assert float(block.mlp.router.weight.abs().max()) <= width**-0.5
    for matrix in (block.mlp.experts.w12, block.mlp.experts.w3):
        assert 0.99 * bound < float(matrix.abs().max()) <= bound
    assert 0.98 * (6 / 192) ** 0.5 < float(block.mlp.shared.w12.weight.abs().max()) <= (6 / 192) ** 0.5
