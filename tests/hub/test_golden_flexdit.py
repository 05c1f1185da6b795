"""changsn/SparseDiT's own numbers, and its names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ditloom.backbones.flexdit import FlexDiTConfig
from ditloom.contracts.condition import Condition
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign
from tests.hub.golden_records import assert_equals, golden, loaded, x_of

SMALL: dict[str, Any] = {"width": 48, "heads": 2, "classes": 10, "image_size": 8, "channels": 2}
CONFIGS = {
    "all": FlexDiTConfig(**SMALL, depth=10, pooling=2, groups=2, group=(1, 1, 1, 1), dense=0, sides=(2,)),
    "two-merges": FlexDiTConfig(**SMALL, depth=6, pooling=0, groups=1, group=(2, 1, 1, 1), dense=1, sides=(3,)),
}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_computes_what_the_official_module_computes(name: str) -> None:
    record, config = golden("flexdit")[name], CONFIGS[name]
    backbone = loaded(config, "flexdit", record["tensors"])
    t = config.time.noise_level(torch.tensor(record["time"]))
    assert_equals(backbone(x_of(config), t, Condition(label=torch.tensor(record["labels"]))), record)


def test_settings_are_read_from_the_weights() -> None:
    config = FlexDiTConfig(
        depth=12, width=384, heads=6, image_size=16, pooling=1, groups=2, group=(1, 2, 1, 1), dense=1
    )
    assert load_foreign(foreign_state_dict(config.build(), "flexdit")).preset == config
