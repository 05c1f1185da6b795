"""alibaba-damo-academy/DyDiT's own numbers: outputs and masks, dynamic and complete; and its names."""

from __future__ import annotations

from typing import Any

import torch

from ditloom.backbones.dydit import MASKS, DyDiTConfig
from ditloom.contracts.condition import Condition
from ditloom.contracts.plan import BlockPlan
from ditloom.hub.checkpoint import load_foreign
from tests.backbones.tiny import planned
from tests.hub.golden_records import assert_equals, filled, golden, loaded, x_of

CONFIG = DyDiTConfig(depth=3, width=48, heads=4, classes=10, image_size=8, channels=2)


def given(record: dict[str, Any]) -> tuple[Any, ...]:
    t = CONFIG.time.noise_level(torch.tensor(record["time"]))
    return x_of(CONFIG), t, Condition(label=torch.tensor(record["labels"]))


@torch.no_grad()
def test_computes_and_chooses_what_the_official_module_does() -> None:
    record = golden("dydit")["dynamic"]
    backbone = loaded(CONFIG, "dydit", record["tensors"])
    assert_equals(backbone(*given(record)), record)
    keep = {i: (BlockPlan(keep=MASKS), {}) for i in range(3)}
    _, kept = planned(backbone, *given(record), keep)
    for name in ("head_mask", "group_mask"):
        found = torch.stack([kept[i][name][:, 0] for i in range(3)], dim=1)
        assert found.flatten().tolist() == record[name]
    tokens = torch.stack([kept[i]["token_mask"].sum((1, 2)) for i in range(3)], dim=1)
    assert tokens.tolist() == record["tokens"]


@torch.no_grad()
def test_the_complete_model_is_the_official_complete_model() -> None:
    record = golden("dydit")["complete"]
    backbone: Any = loaded(CONFIG, "dydit", record["tensors"])
    assert_equals(backbone.complete()(*given(record)), record)


def test_settings_are_read_from_the_weights() -> None:
    assert load_foreign(filled(CONFIG, "dydit")).preset == CONFIG
