"""VinAIResearch/DiMSUM's own numbers, with sequential references in place of its CUDA kernels, and its names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ditloom.backbones.dimsum import PRESETS, DiMSUMConfig
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign, save_foreign
from tests.hub.golden_records import assert_equals, filled, golden, loaded, x_of

CONFIG = DiMSUMConfig(depth=4, width=32, every=2, classes=10, image_size=16, channels=2)


def is_filter(name: str) -> bool:
    return ".dwt." in name or ".idwt." in name


@torch.no_grad()
def test_computes_what_the_official_module_computes() -> None:
    record = golden("dimsum")["combined"]
    backbone = loaded(CONFIG, "dimsum", record["tensors"], table=is_filter)
    t = CONFIG.time.noise_level(torch.tensor(record["time"]))
    y = backbone(x_of(CONFIG), t, Condition(label=torch.tensor(record["labels"])))
    assert_equals(y, record, sign=CONFIG.sign)


def test_settings_are_read_from_the_weights() -> None:
    config = replace(CONFIG, every=4)
    assert load_foreign(filled(config, "dimsum", table=is_filter)).preset == config
    alone = replace(CONFIG, every=5)
    assert load_foreign(filled(alone, "dimsum", table=is_filter)).preset == alone


def test_names_of_the_released_form(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with torch.device("meta"):
        theirs = foreign_state_dict(PRESETS["DiMSUM-L/2"].build(), "dimsum")
    assert theirs["blocks.15.spatial_mamba.mixer.cond_proj.weight"].shape == (1024, 1024)
    assert theirs["blocks.8.proj.qkv2.weight"].shape == (1536, 512)
    assert theirs["attn_block.mlp.w12.weight"].shape == (8192, 1024)
    assert sum(key.startswith("attn_block.") for key in theirs) == 10
    ours = CONFIG.build()
    path = save_foreign(ours, "dimsum", tmp_path / "dimsum.pt")
    again = load_foreign(path, CONFIG).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in ours.state_dict().items())
    other = {**foreign_state_dict(ours, "dimsum"), "blocks.1.freq_mamba.dwt.w_hh": torch.ones(1, 1, 2, 2)}
    with pytest.raises(UserError, match=r"blocks\.1\.freq_mamba\.dwt\.w_hh .*Haar filter"):
        load_foreign(other, CONFIG)
