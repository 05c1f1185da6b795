"""The official PixArtMS's own numbers, with every kind of compressed keys and with size conditions.

Tensor j of the sorted names (the position table excluded) is `formula(shape, j, 0.3)`; x is tensor 1000, text tensor
1001, at scale 1.5; native times 998, 420, 13; 5, 3 and 1 of 5 text tokens are real.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ditloom.backbones.pixart_sigma import PixArtConfig
from ditloom.contracts.condition import Condition
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign
from tests.hub.test_golden import formula

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("pixart_sigma.json").read_text())
SMALL = {
    "depth": 3,
    "width": 48,
    "heads": 2,
    "image_size": 8,
    "channels": 3,
    "text_width": 20,
    "text_tokens": 5,
    "null_tokens": 5,
}
CONFIGS = {
    "conv": PixArtConfig(**SMALL, interpolation=2.0, qk_norm="layer-affine-full", compressed=(1, 2)),
    "uniform": PixArtConfig(**SMALL, compressed=(0, 2), kind="uniform"),
    "ave": PixArtConfig(**SMALL, compressed=(0, 2), kind="uniform"),
    "uniform-every": PixArtConfig(**SMALL, interpolation=0.5, compressed=(1,), compression=3, kind="uniform-every"),
    "sized": PixArtConfig(**SMALL, interpolation=2.0, sized=True, learn_sigma=False),
}


def told() -> dict[str, Tensor]:
    size = torch.tensor([[512.0, 768.0], [1024.0, 1024.0], [300.0, 700.0]])
    return {"size": size, "aspect": torch.tensor([[0.66], [1.0], [0.43]])}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_computes_what_the_official_module_computes(name: str) -> None:
    golden, config = GOLDEN[name], CONFIGS[name]
    theirs = foreign_state_dict(config.build(), "pixart")
    theirs = {k: formula(tuple(theirs[k].shape), j, 0.3) for j, k in enumerate(sorted(theirs))}
    assert len(theirs) == golden["tensors"]
    backbone = load_foreign(theirs, config, "pixart")
    mask = torch.arange(5)[None] < torch.tensor([5, 3, 1])[:, None]
    text = formula((3, 1, 5, 20), 1001, 1.5)[:, 0]
    condition = Condition(text=text, text_mask=mask, extra=told() if config.sized else {})
    t = config.time.noise_level(torch.tensor([998.0, 420.0, 13.0]))
    y = backbone(formula((3, 3, *golden["size"]), 1000, 1.5), t, condition)
    expected = torch.tensor(golden["output"]).reshape(golden["shape"])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
