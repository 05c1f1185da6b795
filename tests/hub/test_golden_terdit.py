"""Lucky-Lance/TerDiT's own numbers, gradients through the ternary weights among them, and its names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ditloom.backbones.terdit import PRESETS, TerDiTConfig
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign, save_foreign
from tests.hub.golden_records import assert_equals, filled, golden, loaded, x_of

CONFIG = TerDiTConfig(depth=3, width=48, heads=2, classes=10, image_size=8, channels=3, multiple=16)


def test_computes_and_learns_as_the_official_module_does() -> None:
    record = golden("terdit")["DiT_Llama"]
    backbone: Any = loaded(CONFIG, "terdit", record["tensors"], table=lambda k: False)
    t = CONFIG.time.noise_level(torch.tensor(record["time"]))
    y = backbone(x_of(CONFIG), t, Condition(label=torch.tensor(record["labels"])))
    assert_equals(y.detach(), record)
    y.square().mean().backward()
    expected = {k: torch.tensor(v) for k, v in record["gradients"].items()}
    found = {
        "layers.1.attention.wk.weight": backbone.blocks[1].attn.qkv.weight.grad.chunk(3)[1].flatten()[:8],
        "layers.0.feed_forward.w2.alphas": backbone.blocks[0].mlp.w3.alphas.grad,
        "layers.2.adaLN_modulation.1.weight": backbone.blocks[2].modulation.linear.weight.grad.flatten()[:8],
    }
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_names_and_shapes_of_the_published_sizes(tmp_path: Any) -> None:
    with torch.device("meta"):
        theirs = foreign_state_dict(PRESETS["TerDiT-600M/2"].build(), "terdit")
    assert theirs["layers.15.feed_forward.w2.weight"].shape == (1536, 4096)
    assert theirs["layers.0.attention.wk.alphas"].shape == (1,)
    assert theirs["layers.0.adaLN_modulation.2.weight"].shape == (9216,)
    assert theirs["x_embedder.weight"].shape == (1536, 16)
    with pytest.raises(UserError, match="no published TerDiT"):
        load_foreign(filled(CONFIG, "terdit"))
    full = TerDiTConfig(depth=1, width=48, heads=2, ternary=False).build()
    with pytest.raises(UserError, match="ternary"):
        save_foreign(full, "terdit", tmp_path / "model.pt")
