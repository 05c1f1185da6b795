"""Published sizes: exact numbers of learned parameters, multiply-accumulates, tensors, and settings as plain values."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ditloom.contracts.registries import BACKBONES
from ditloom.hub.checkpoint import foreign_state_dict

DIT = {
    "S": (32_865_056, 32_920_448, 33_142_016),
    "B": (130_315_808, 130_426_496, 130_869_248),
    "L": (457_840_672, 457_988_224, 458_578_432),
    "XL": (674_834_720, 675_000_704, 675_664_640),
}
DIT_GMACS = {
    "S": (6.06, 1.41, 0.36),
    "B": (23.01, 5.57, 1.42),
    "L": (80.70, 19.70, 5.01),
    "XL": (118.62, 29.04, 7.39),
}
COUNTS = {
    **{
        f"{f}-{s}/{p}": n for f in ("DiT", "SiT") for s, row in DIT.items() for p, n in zip((2, 4, 8), row, strict=True)
    },
    "LightningDiT-B/1": 130_359_584,
    "LightningDiT-L/1": 457_890_816,
    "LightningDiT-XL/1": 674_961_824,
    "LightningDiT-1p0B/1": 1_029_007_904,
    "LightningDiT-1p6B/1": 1_631_308_368,
    # the paper's table: 44M, 131M, 287M, 501M; deep 58M (text)
    "U-ViT-S/2": 44_772_516,
    "U-ViT-M/2": 130_891_940,
    "U-ViT-L/2": 286_763_172,
    "U-ViT-H/2": 500_832_016,
    "U-ViT-L/4": 286_861_524,
    "U-ViT-H/4": 500_942_656,
    "U-ViT-S/2-T2I": 44_692_644,
    "U-ViT-S-deep/2-T2I": 58_345_636,
    "U-ViT-0.5B/2-T2I": 505_371_044,
    "U-ViT-1.6B/2-T2I": 1_588_400_292,
    "U-ViT-2.3B/2-T2I": 2_352_064_676,
    "SD3-medium": 2_028_328_000,
    "SD3.5-medium": 2_243_171_520,
    "SD3.5-large": 8_056_627_520,
    "MMDiT-XXS/1": 4_737_808,
    "MMDiT-XS/1": 10_534_544,
    "MMDiT-S/1": 23_351_056,
    "MMDiT-M/1": 62_918_416,
    "MMDiT-XXS/2": 4_750_144,
    "MMDiT-XS/2": 10_553_024,
    "MMDiT-S/2": 23_375_680,
    "MMDiT-M/2": 62_955_328,
}


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


@pytest.mark.parametrize("name", [n for n in COUNTS if n.startswith("DiT")])
def test_multiply_accumulates_of_the_published_table(name: str) -> None:
    size, patch = name.removeprefix("DiT-").split("/")
    backbone = on_meta(name)
    x, t, condition = backbone.example(1, "meta")
    streams, _ = backbone.embed(x, t, backbone.prepare(condition))
    expected = DIT_GMACS[size][(2, 4, 8).index(int(patch))]
    assert backbone.macs(streams.layout) / 1e9 == pytest.approx(expected, abs=0.0051)


@pytest.mark.parametrize("name", ["DiT-XL/2", "LightningDiT-XL/1", "U-ViT-H/2", "U-ViT-2.3B/2-T2I", "SD3.5-medium"])
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
