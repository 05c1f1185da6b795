"""The official modules' own numbers: same weights by formula, same inputs, same outputs.

Each record of golden.json names the repository and commit whose module was run, in float32 on a CPU. Tensor j of the
sorted names (tables excluded) is filled by `formula(shape, j, 0.3)`, x is tensor 1000, text tensor 1001, at scale 1.5.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.backbones.dit import DiTConfig
from ditloom.backbones.lightning_dit import LightningDiTConfig
from ditloom.backbones.sit import SiTConfig
from ditloom.backbones.u_vit import UViTConfig
from ditloom.contracts.condition import Condition
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign

GOLDEN = {k: v for k, v in json.loads(Path(__file__).with_name("golden.json").read_text()).items() if k != "note"}
DIT = {"depth": 3, "width": 48, "heads": 2, "classes": 10}
LATENT = {**DIT, "image_size": 4, "channels": 3}
PIXEL = {"depth": 4, "width": 48, "heads": 2, "patch": 2, "image_size": 6, "channels": 2}
CONFIGS: dict[str, Any] = {
    "facebook-dit": DiTConfig(**DIT, image_size=6, channels=2),
    "sit": SiTConfig(**DIT, image_size=6, channels=2),
    "lightning-dit": LightningDiTConfig(**LATENT),
    "lightning-dit-all": LightningDiTConfig(**LATENT, qk_norm=True, shift=False),
    "lightning-dit-layer-norm": LightningDiTConfig(
        **LATENT, qk_norm=True, rms_norm=False, swiglu=False, learn_sigma=True
    ),
    "u-vit": UViTConfig(**PIXEL, classes=10),
    "u-vit-plain": UViTConfig(**PIXEL, time_mlp=True, convolution=False, qkv_bias=True),
    "u-vit-t2i": UViTConfig(**PIXEL, text_width=20, text_tokens=5),
}
FORMATS = {
    name: next(f for f in ("facebook-dit", "sit", "lightning-dit", "u-vit") if name.startswith(f)) for name in CONFIGS
}


def formula(shape: tuple[int, ...], number: int, scale: float) -> Tensor:
    """scale * sin(1000 sin(e + 7 number + 1)) of the flat index e, in float64, rounded to float32."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(1000 * torch.sin(index + 7 * number + 1))).reshape(shape).to(torch.float32)


def filled(name: str) -> dict[str, Tensor]:
    """A foreign state dict with the formula's weights; what only they store (tables) as it is."""
    theirs = foreign_state_dict(CONFIGS[name].build(), FORMATS[name])
    learned = FORMATS[name] == "u-vit"
    names = sorted(k for k in theirs if learned or k != "pos_embed" and not k.startswith("feat_rope."))
    return {**theirs, **{k: formula(tuple(theirs[k].shape), j, 0.3) for j, k in enumerate(names)}}


@pytest.mark.parametrize("name", GOLDEN)
def test_computes_what_the_official_module_computes(name: str) -> None:
    golden, config = GOLDEN[name], CONFIGS[name]
    theirs = filled(name)
    assert len(theirs) == golden["tensors"]
    backbone = load_foreign(theirs, config, FORMATS[name])
    x = formula((3, config.channels, config.image_size, config.image_size), 1000, 1.5)
    labels = torch.tensor(golden["labels"]) if golden["labels"] else None
    text = formula(tuple(golden["text"]), 1001, 1.5) if "text" in golden else None
    t = config.time.noise_level(torch.tensor(golden["time"]))
    with torch.no_grad():
        y = backbone(x, t, Condition(label=labels, text=text))
    expected = config.sign * torch.tensor(golden["output"]).reshape(golden["shape"])  # theirs points to the data
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", GOLDEN)
def test_settings_are_read_from_the_weights(name: str) -> None:
    theirs = filled(name)
    try:
        backbone = load_foreign(theirs, format=FORMATS[name])
    except Exception as error:
        assert "heads" in str(error) or "square" in str(error), error
    else:
        assert backbone.preset == CONFIGS[name]
