"""TerDiT: three values per layer, the norm after the modulation, and that it learns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ditloom.backbones.terdit import PRESETS, TerDiTConfig
from ditloom.contracts.errors import UserError
from ditloom.parts.modulation import AdaLN
from ditloom.parts.ternary import NormedAdaLN, TernaryLinear, ternary
from tests.backbones.portrait import LATENT
from tests.backbones.tiny import TINY, embedded, inputs, make


def test_only_three_values_per_layer_and_part() -> None:
    backbone: Any = make("terdit")
    layers = [m for m in backbone.modules() if isinstance(m, TernaryLinear)]
    assert len(layers) == 3 * 5
    for layer in layers:
        for alpha, part in zip(layer.alphas, layer.deployed().chunk(layer.parts), strict=True):
            values = set((part / alpha).flatten().round(decimals=5).tolist())
            assert values == {-1.0, 0.0, 1.0}
    full = [m for m in TINY["terdit-full"].build().modules() if isinstance(m, TernaryLinear)]
    assert not full


def test_the_gradient_goes_straight_through() -> None:
    weight = torch.tensor([[0.9, -0.1], [0.2, -2.0]], requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    result = ternary(weight)
    assert result.tolist() == [[1, 0], [0, -1]]  # mean size 0.8
    (result * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream)
    assert not ternary(torch.zeros(2, 2)).any()


def test_what_stays_in_full_precision() -> None:
    backbone: Any = make("terdit")
    kinds = {name: type(m) for name, m in backbone.named_modules() if isinstance(m, nn.Linear)}
    outside = {name for name, kind in kinds.items() if kind is nn.Linear}
    assert outside == {
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "final_layer.linear",
        "final_layer.modulation.linear",
    }


@torch.no_grad()
def test_the_norm_bounds_the_modulation_whatever_the_layer() -> None:
    torch.manual_seed(0)
    c = torch.randn(4, 1, 64)
    normed = NormedAdaLN(64, 6, 64, TernaryLinear(64, 6 * 64))
    plain = AdaLN(64, 6)
    for scale in (0.1, 1.0, 30.0):
        normed.linear.alphas.fill_(scale)
        plain.linear.weight.copy_(scale * ternary(normed.linear.weight))
        bounded = torch.cat(normed(c), dim=-1)
        free = torch.cat(plain(c), dim=-1)
        assert float(bounded.square().mean(-1).sqrt().max()) == pytest.approx(1.0, abs=0.01)
        assert 0.5 < float(free.std()) / (scale * 3) < 2.0


@torch.no_grad()
def test_starts_as_identity_with_scales_that_can_move() -> None:
    backbone: Any = TINY["terdit"].build()
    streams, context = embedded(backbone, *inputs(backbone))
    assert torch.equal(backbone.run(streams, context)["image"], streams["image"])
    for block in backbone.blocks:
        assert not block.modulation.linear.weight.any()
        assert float(block.modulation.linear.alphas) > 0
        assert (block.modulation.norm.weight == 1).all()
        mean = block.attn.proj.weight.abs().mean()
        assert float(block.attn.proj.alphas) == pytest.approx(float(mean))


@torch.no_grad()
def test_positions_run_along_the_sequence() -> None:
    """A one-axis table: the logits of two tokens depend on their distance in the row-major order alone."""
    backbone: Any = make("terdit")
    _, context = embedded(backbone, *inputs(backbone))
    cos, sin = context.rotary["image"]
    assert cos.shape == (16, 16)
    turn = torch.complex(cos[:, ::2], sin[:, ::2])
    torch.testing.assert_close(turn[5] * turn[3].conj(), turn[9] * turn[7].conj(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turn[4] * turn[3].conj(), turn[1], rtol=1e-5, atol=1e-5)  # across a row's end


def test_the_ternary_network_learns_and_full_precision_a_little_more() -> None:
    """One batch, overfitted: both losses fall by half or more, the same trunk's at full precision further."""
    config = TerDiTConfig(**{**LATENT, "depth": 1}, classes=10, multiple=16, learn_sigma=False)
    last = {}
    for kind in (True, False):
        torch.manual_seed(0)
        backbone: Any = replace(config, ternary=kind).build()
        x, t, condition = inputs(backbone)
        target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        optimiser = torch.optim.AdamW(backbone.parameters(), lr=4e-3)
        for step in range(60):
            for group in optimiser.param_groups:
                group["lr"] = 4e-3 * min(1.0, (step + 1) / 10)
            loss = (backbone(x, t, condition) - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        last[kind] = float(loss.detach()) / float(target.square().mean())
    assert last[True] < 0.5
    assert last[False] < last[True]


def test_sizes_and_what_it_cannot_do() -> None:
    assert [PRESETS[name].hidden for name in PRESETS] == [4096, 8192]
    assert [PRESETS[name].condition_width for name in PRESETS] == [1024, 1024]
    with pytest.raises(UserError, match="softmax attention"):
        TerDiTConfig(depth=1, width=64, heads=4, attention="diff")
    with pytest.raises(UserError, match="must be even"):
        TerDiTConfig(depth=1, width=60, heads=4)
    with pytest.raises(UserError, match="not 3 equal parts"):
        TernaryLinear(4, 8, parts=3)
