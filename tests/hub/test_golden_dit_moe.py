"""feizc/DiT-MoE's own numbers, and its names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ditloom.backbones.dit_moe import PRESETS, DiTMoEConfig
from ditloom.contracts.condition import Condition
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign, save_foreign
from ditloom.parts.experts import balance_loss
from ditloom.sites.visit import visit
from tests.hub.golden_records import assert_equals, filled, golden, loaded, x_of
from tests.hub.test_golden import formula

SIZES: dict[str, Any] = {"depth": 3, "width": 48, "heads": 2, "classes": 10, "image_size": 6, "channels": 2}
CONFIGS = {"dit-moe": DiTMoEConfig(**SIZES, experts=5), "dit-moe-k3": DiTMoEConfig(**SIZES, experts=5, top_k=3)}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_computes_what_the_official_module_computes(name: str) -> None:
    record, config = golden("dit_moe")[name], CONFIGS[name]
    backbone = loaded(config, "dit-moe", record["tensors"])
    t = config.time.noise_level(torch.tensor(record["time"]))
    y = backbone(x_of(config), t, Condition(label=torch.tensor(record["labels"])))
    assert_equals(y, record)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_routes_as_the_official_router_and_has_its_balance_loss(name: str) -> None:
    from ditloom.contracts.layout import Layout
    from ditloom.contracts.plan import BlockPlan

    record, config = golden("dit_moe")[name], CONFIGS[name]
    moe: Any = loaded(config, "dit-moe", record["tensors"]).blocks[0].mlp
    h = formula((3, 9, 48), 1002, 1.5)
    _, gates, chosen = moe.router(h)
    theirs = dict(zip(range(27), torch.tensor(record["chosen"]).view(27, -1), strict=True))
    weights = torch.tensor(record["gates"]).view(27, -1)
    for token, numbers in theirs.items():
        order = weights[token].argsort(descending=True)  # theirs are in no order
        assert chosen.flatten(0, 1)[token].tolist() == numbers[order].tolist()
        torch.testing.assert_close(gates.flatten(0, 1)[token], weights[token][order])
    at: Any = visit(BlockPlan(keep=("balance",)), {}, Layout(()))
    moe(h, at)
    assert float(0.01 * balance_loss(at.kept["balance"])) == pytest.approx(record["aux_loss"], rel=1e-5)


@pytest.mark.parametrize("normed", [False, True])
def test_a_file_of_theirs_is_what_it_was(normed: bool, tmp_path: Path) -> None:
    """With the names that flash attention has, where there are norms of queries and keys."""
    size = DiTMoEConfig(depth=12, width=384, heads=6, image_size=8, experts=3)
    config = replace(size, qk_norm=True, flow=True, time=PRESETS["DiT-MoE-G/2-16E2A"].time) if normed else size
    theirs = filled(config, "dit-moe")
    assert ("blocks.0.attn.Wqkv.weight" in theirs) == normed
    ours = load_foreign(theirs)
    assert ours.preset == config
    again = load_foreign(save_foreign(ours, "dit-moe", tmp_path / "dit_moe.pt"))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


def test_the_official_names_of_the_largest() -> None:
    with torch.device("meta"):
        theirs = foreign_state_dict(PRESETS["DiT-MoE-G/2-16E2A"].build(), "dit-moe")
    shapes = {
        "blocks.39.moe.gate.weight": (16, 1408),
        "blocks.39.moe.experts.15.gate_proj.weight": (5632, 1408),
        "blocks.39.moe.experts.15.down_proj.weight": (1408, 5632),
        "blocks.0.moe.shared_experts.up_proj.weight": (2816, 1408),
        "blocks.0.attn.out_proj.bias": (1408,),
        "blocks.0.attn.q_norm.bias": (88,),
    }
    assert {key: tuple(theirs[key].shape) for key in shapes} == shapes
    assert len(theirs) == 12 + 40 * (4 + 4 + 2 + 1 + 16 * 3 + 3)
