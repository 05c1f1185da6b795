"""YuchuanTian/DiC's own numbers, and its names."""

from __future__ import annotations

import pytest
import torch

from ditloom.backbones.dic import PRESETS, DiCConfig
from ditloom.contracts.condition import Condition
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign, save_foreign
from tests.hub.golden_records import assert_equals, filled, golden, loaded, x_of

SMALL = {"width": 16, "depths": (2, 4, 1, 4, 2), "classes": 10, "image_size": 8, "channels": 2}
CONFIGS = {
    "stride 3": DiCConfig(**SMALL),
    "stride 2, one output": DiCConfig(**SMALL, learn_sigma=False, skip_stride=2),
}
GOLDEN = golden("dic")


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_computes_what_the_official_module_computes(name: str) -> None:
    record, config = GOLDEN[name], CONFIGS[name]
    backbone = loaded(config, "dic", record["tensors"])
    t = config.time.noise_level(torch.tensor(record["time"]))
    y = backbone(x_of(config), t, Condition(label=torch.tensor(record["labels"])))
    assert_equals(y, record)


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_are_read_from_the_weights(name: str) -> None:
    found = load_foreign(filled(CONFIGS[name], "dic")).preset
    assert found == CONFIGS[name].__class__(**{**vars(CONFIGS[name]), "image_size": found.image_size})


def test_names_of_the_released_form(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with torch.device("meta"):
        theirs = foreign_state_dict(PRESETS["DiC-XL"].build(), "dic")
    assert theirs["dec_blocks.0.0.conv.conv0.weight"].shape == (768, 1536, 3, 3)
    assert theirs["dec_blocks.1.6.conv.skip.weight"].shape == (384, 768, 1, 1)
    assert "dec_blocks.1.5.conv.skip.weight" not in theirs
    ours = CONFIGS["stride 3"].build()
    again = load_foreign(save_foreign(ours, "dic", tmp_path / "dic.pt")).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in ours.state_dict().items())
