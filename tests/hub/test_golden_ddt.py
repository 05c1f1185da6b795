"""The own numbers of MCG-NJU/DDT and of bytetriper/RAE's DiT-DH, and their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.backbones.ddt import PRESETS, DDTConfig
from ditloom.backbones.dit_dh import DiTDHConfig
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign
from tests.hub.golden_records import assert_equals, filled, golden, loaded, x_of
from tests.hub.test_golden import formula

DDT = DDTConfig(depth=2, head_depth=2, width=48, heads=2, classes=10, channels=3)
SMALL: dict[str, Any] = {"depth": 2, "width": 48, "heads": 2, "classes": 10, "image_size": 4, "channels": 6}
HEADS = {
    "DiTwDDTHead": DiTDHConfig(**SMALL, head_width=64, head_heads=4),
    "equal": DiTDHConfig(**SMALL, head_width=48, head_heads=4),
}


def is_table(key: str) -> bool:
    return key == "pos_embed" or "feat_rope" in key


def given(record: dict[str, Any], config: Any) -> tuple[Tensor, Condition]:
    t = config.time.noise_level(torch.tensor(record["time"]))
    return t, Condition(label=torch.tensor(record["labels"]))


@torch.no_grad()
def test_ddt_computes_what_the_official_module_computes() -> None:
    record = golden("ddt")["DDT"]
    backbone = loaded(DDT, "ddt", record["tensors"])
    y = backbone(x_of(DDT, size=(6, 8)), *given(record, DDT))
    assert_equals(y, record, DDT.sign)


@torch.no_grad()
def test_a_state_handed_in_is_used_as_the_official_module_uses_it() -> None:
    """Official: forward(x, t, y, s) with the state of another x and t. Here: the encoder's range is kept."""
    records = golden("ddt")
    backbone = loaded(DDT, "ddt", records["DDT"]["tensors"])
    t, condition = given(records["DDT"], DDT)
    memory = backbone.prepare(condition)
    state, context = backbone.embed(x_of(DDT, size=(6, 8)), DDT.time.native(t), memory)
    for block in backbone.blocks[:2]:
        state, _ = block(state, context)
    t, _ = given(records["reused"], DDT)
    _, context = backbone.embed(formula((3, 3, 6, 8), 1002, 1.5), DDT.time.native(t), memory)
    for block in backbone.blocks[2:]:
        state, _ = block(state, context)
    assert_equals(backbone.head(state, context), records["reused"], DDT.sign)


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_dit_dh_computes_what_the_official_module_computes(name: str) -> None:
    record, config = golden("dit_dh")[name], HEADS[name]
    backbone = loaded(config, "dit-dh", record["tensors"], table=is_table)
    assert_equals(backbone(x_of(config), *given(record, config)), record)


def test_settings_are_read_from_the_weights() -> None:
    for config in HEADS.values():
        assert load_foreign(filled(config, "dit-dh", is_table)).preset == config
    with torch.device("meta"):
        released = foreign_state_dict(PRESETS["DDT-XL/2"].build(), "ddt")
    assert released["blocks.27.mlp.w2.weight"].shape == (1152, 3072)
    assert released["x_embedder.proj.weight"].shape == (1152, 16)
    with pytest.raises(UserError, match="where the encoder of a DDT ends"):
        load_foreign(filled(DDT, "ddt"))


def test_of_a_training_run_the_average_is_taken() -> None:
    theirs = filled(DDT, "ddt")
    held = {f"denoiser.{k}": torch.zeros_like(v) for k, v in theirs.items()}
    held |= {f"ema_denoiser.{k}": v for k, v in theirs.items()} | {"diffusion_trainer.proj.weight": torch.zeros(2)}
    backbone = load_foreign(held, DDT)
    assert torch.equal(backbone.s_embedder.proj.weight.flatten(1), theirs["s_embedder.proj.weight"])
