"""feizc/DiS's own numbers, with the sequential references it documents in place of its CUDA kernels, and its names."""

from __future__ import annotations

import pytest
import torch

from ditloom.backbones.dis import PRESETS, DiSConfig
from ditloom.contracts.condition import Condition
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign, save_foreign
from tests.hub.golden_records import assert_equals, filled, golden, loaded, x_of

SMALL = {"depth": 4, "width": 24, "image_size": 8, "channels": 2}
CONFIGS = {
    "classes": DiSConfig(**SMALL, classes=10),
    "unconditional": DiSConfig(**SMALL, classes=0, learn_sigma=False),
}
GOLDEN = golden("dis")


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_computes_what_the_official_module_computes(name: str) -> None:
    record, config = GOLDEN[name], CONFIGS[name]
    backbone = loaded(config, "dis", record["tensors"], table=lambda k: False)
    t = config.time.noise_level(torch.tensor(record["time"]))
    condition = Condition(label=torch.tensor(record["labels"])) if record["labels"] else Condition()
    assert_equals(backbone(x_of(config), t, condition), record)


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_are_read_from_the_weights(name: str) -> None:
    assert load_foreign(filled(CONFIGS[name], "dis")).preset == CONFIGS[name]


def test_names_of_the_released_form(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with torch.device("meta"):
        theirs = foreign_state_dict(PRESETS["DiS-H/2"].build(), "dis")
    assert theirs["out_blocks.23.mixer.dt_proj_b.weight"].shape == (3072, 96)
    assert theirs["mid_block.mixer.A_b_log"].shape == (3072, 16)
    assert theirs["out_blocks.0.skip_linear.weight"].shape == (1536, 3072)
    ours = CONFIGS["classes"].build()
    again = load_foreign(save_foreign(ours, "dis", tmp_path / "dis.pt")).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in ours.state_dict().items())
