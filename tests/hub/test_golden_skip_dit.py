"""OpenSparseLLMs/Skip-DiT's own numbers, and its names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ditloom.backbones.skip_dit import PRESETS, SkipDiTConfig
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign, save_foreign
from tests.hub.golden_records import assert_equals, golden, loaded, x_of

CONFIG = SkipDiTConfig(depth=4, width=48, heads=2, classes=10, image_size=6, channels=2)


@torch.no_grad()
def test_computes_what_the_official_module_computes() -> None:
    record = golden("skip_dit")["DiT_skip"]
    backbone = loaded(CONFIG, "skip-dit", record["tensors"])
    t = CONFIG.time.noise_level(torch.tensor(record["time"]))
    y = backbone(x_of(CONFIG), t, Condition(label=torch.tensor(record["labels"])))
    assert_equals(y, record)


def test_the_names_tell_it_from_a_dit() -> None:
    with torch.device("meta"):
        theirs = foreign_state_dict(PRESETS["Skip-DiT-XL/2"].build(), "skip-dit")
    assert len(theirs) == 292 + 14 * 4
    assert theirs["skip_linears.13.linear.weight"].shape == (1152, 2304)
    assert theirs["skip_norms.0.bias"].shape == (2304,)
    small = SkipDiTConfig(depth=12, width=384, heads=6, image_size=8)
    assert load_foreign(foreign_state_dict(small.build(), "skip-dit")).preset == small


def test_the_residual_form_has_no_place_there(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="residual"):
        save_foreign(replace(CONFIG, residual=True).build(), "skip-dit", tmp_path / "model.pt")
