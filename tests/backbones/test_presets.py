"""Published sizes: exact numbers of learned parameters, multiply-accumulates, tensors, and settings as plain values."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ditloom.contracts.registries import BACKBONES
from ditloom.hub.checkpoint import foreign_state_dict
from tests.backbones.portrait import PORTRAITS

DIT_GMACS = {
    "S": (6.06, 1.41, 0.36),
    "B": (23.01, 5.57, 1.42),
    "L": (80.70, 19.70, 5.01),
    "XL": (118.62, 29.04, 7.39),
}
COUNTS = {name: count for p in PORTRAITS.values() for name, count in p.counts.items()}


def presets() -> dict[str, Any]:
    """Every preset of every family."""
    found: dict[str, Any] = {}
    for family in BACKBONES.names():
        module = __import__(BACKBONES.get(family).__module__, fromlist=["PRESETS"])
        found.update(module.PRESETS)
    return found


PRESETS = presets()


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return PRESETS[name].build()


def test_every_preset_has_its_number_here() -> None:
    assert set(PRESETS) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_learned_parameters(name: str) -> None:
    assert on_meta(name).learned_parameters() == COUNTS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_settings_as_plain_values(name: str) -> None:
    config = PRESETS[name]
    values = json.loads(json.dumps(config.to_dict()))
    assert type(config).from_dict(values) == config
    assert values["family"] == config.family
    assert {"name", "predicts"} <= config.process.keys()
    assert config.sign in (1, -1)


@pytest.mark.parametrize("name", [n for n in COUNTS if re.fullmatch("DiT-(S|B|L|XL)/[248]", n)])
def test_multiply_accumulates_of_the_published_table(name: str) -> None:
    size, patch = name.removeprefix("DiT-").split("/")
    backbone = on_meta(name)
    x, t, condition = backbone.example(1, "meta")
    streams, _ = backbone.embed(x, t, backbone.prepare(condition))
    expected = DIT_GMACS[size][(2, 4, 8).index(int(patch))]
    assert backbone.macs(streams.layout) / 1e9 == pytest.approx(expected, abs=0.0051)


@pytest.mark.parametrize("name", [name for p in PORTRAITS.values() for name in p.counted])
def test_multiply_accumulates_are_what_runs(name: str) -> None:
    backbone = on_meta(name)
    x, t, condition = backbone.example(1, "meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(x, t, condition)
    streams, _ = backbone.embed(x, t, backbone.prepare(condition))
    assert counter.get_total_flops() == 2 * backbone.macs(streams.layout)


def test_position_tables_are_the_published_size() -> None:
    sizes = {"SD3-medium": 56_623_104, "SD3.5-medium": 226_492_416, "SD3.5-large": 89_653_248}
    assert {name: on_meta(name).pos_embed.table.numel() for name in sizes} == sizes


def test_the_official_checkpoint_has_292_tensors() -> None:
    theirs = foreign_state_dict(on_meta("DiT-XL/2"), "facebook-dit")
    assert len(theirs) == 292
    shapes = {
        "pos_embed": (1, 256, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "blocks.27.attn.qkv.weight": (3456, 1152),
        "blocks.27.attn.proj.bias": (1152,),
        "blocks.0.mlp.fc1.weight": (4608, 1152),
        "blocks.0.mlp.fc2.weight": (1152, 4608),
        "blocks.5.adaLN_modulation.1.weight": (6912, 1152),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
    }
    assert {key: tuple(theirs[key].shape) for key in shapes} == shapes
    assert foreign_state_dict(on_meta("SiT-XL/2"), "sit").keys() == theirs.keys()
