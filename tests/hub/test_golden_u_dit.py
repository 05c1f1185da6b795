"""YuchuanTian/U-DiT's own numbers, in both forms of its feed-forward, and its names."""

from __future__ import annotations

import pytest
import torch

from ditloom.backbones.u_dit import PRESETS, UDiTConfig
from ditloom.contracts.condition import Condition
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign, save_foreign
from tests.hub.golden_records import assert_equals, filled, golden, loaded, x_of

SMALL = {"width": 16, "heads": 2, "depths": (1, 1, 2, 1, 1), "classes": 10, "image_size": 16, "channels": 1}
CONFIGS = {"training-form": UDiTConfig(**SMALL), "without-branches": UDiTConfig(**SMALL, merged=True)}
GOLDEN = golden("u_dit")


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_computes_what_the_official_module_computes(name: str) -> None:
    record, config = GOLDEN[name], CONFIGS[name]
    backbone = loaded(config, "u-dit", record["tensors"])
    t = config.time.noise_level(torch.tensor(record["time"]))
    condition = Condition(label=torch.tensor(record["labels"]))
    assert_equals(backbone(x_of(config), t, condition), record)
    assert_equals(backbone.merged()(x_of(config), t, condition), record)


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_are_read_from_the_weights(name: str) -> None:
    found = load_foreign(filled(CONFIGS[name], "u-dit")).preset
    assert found == CONFIGS[name].__class__(**{**vars(CONFIGS[name]), "image_size": found.image_size})


def test_names_of_the_released_form(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with torch.device("meta"):
        theirs = foreign_state_dict(PRESETS["U-DiT-S"].build(), "u-dit")
    assert theirs["latent.7.mlp2.project_in.1.weight"].shape == (768, 384, 1, 1)
    assert theirs["reduce_chan_level2.weight"].shape == (192, 384, 1, 1)
    assert theirs["decoder_level_1.1.attn2.logit_scale"].shape == (4, 1, 1)
    ours = CONFIGS["training-form"].build()
    again = load_foreign(save_foreign(ours, "u-dit", tmp_path / "u-dit.pt")).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in ours.state_dict().items())
