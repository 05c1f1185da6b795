"""Skip-DiT: what its wiring is, and what a DiT becomes when it is given skips."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from ditloom.backbones.dit import DiTConfig
from ditloom.backbones.lightning_dit import LightningDiTConfig
from ditloom.backbones.skip_dit import SkipDiT, SkipDiTConfig, from_dit
from ditloom.contracts.errors import UserError
from tests.backbones.portrait import LATENT
from tests.backbones.tiny import TINY, embedded, inputs, make


def plain_dit() -> tuple[DiTConfig, Any]:
    config = DiTConfig(**{**LATENT, "depth": 4}, classes=10)
    dit, generator = config.build().eval(), torch.Generator().manual_seed(8)
    with torch.no_grad():
        for p in dit.parameters():
            p.copy_(0.08 * torch.randn(p.shape, generator=generator))
    return config, dit


def test_pairs_its_halves_last_in_first_out() -> None:
    assert make("skip-dit").skips == {3: 0, 2: 1}
    assert SkipDiTConfig(depth=28, width=64, heads=4).build().skips[27] == 0
    with pytest.raises(UserError, match="even.*got 3"):
        SkipDiTConfig(depth=3, width=64, heads=4)
    assert "skip" not in SkipDiT.missing


@torch.no_grad()
def test_a_skip_is_the_output_of_its_source() -> None:
    """The forward by hand, one merge at a time."""
    backbone = make("skip-dit")
    entered, context = embedded(backbone, *inputs(backbone))
    streams, outs = entered, []
    for i, block in enumerate(backbone.blocks):
        given = {"skip": outs[3 - i].tokens} if i >= 2 else {}
        streams, _ = block(streams, context, None, given)
        outs.append(streams)
    assert torch.equal(backbone.run(entered, context)["image"], outs[-1]["image"])


@torch.no_grad()
def test_a_dit_given_residual_skips_computes_what_it_did() -> None:
    config, dit = plain_dit()
    skipped = from_dit(config, dit.state_dict()).eval()
    args = inputs(dit)
    assert torch.equal(skipped(*args), dit(*args))
    assert skipped.preset.residual
    assert {f.name: getattr(skipped.preset, f.name) for f in fields(config)} == {
        f.name: getattr(config, f.name) for f in fields(config)
    }


@torch.no_grad()
def test_in_the_released_form_it_must_be_trained_first() -> None:
    config, dit = plain_dit()
    skipped = from_dit(config, dit.state_dict(), residual=False).eval()
    args = inputs(dit)
    assert not torch.allclose(skipped(*args), dit(*args), atol=1e-2)
    for block in skipped.blocks[2:]:  # a merge that selects x
        block.merge.norm = torch.nn.Identity()
        block.merge.linear.weight.copy_(torch.eye(64, 128))
        block.merge.linear.bias.zero_()
    torch.testing.assert_close(skipped(*args), dit(*args), rtol=1e-5, atol=1e-5)


def test_gradients_reach_a_merge_that_starts_at_zero() -> None:
    config, dit = plain_dit()
    skipped = from_dit(config, dit.state_dict())
    skipped(*inputs(dit)).square().sum().backward()
    linears = [block.merge.linear for block in skipped.blocks[2:]]
    assert all(float(linear.weight.grad.abs().sum()) > 0 for linear in linears)
    assert not any(linear.weight.any() for linear in linears)


@torch.no_grad()
def test_starts_as_published() -> None:
    """Merges keep torch's defaults in the released form; the residual one starts as identity blocks."""
    released, residual = (TINY[name].build() for name in ("skip-dit", "skip-dit-residual"))
    assert released.blocks[2].merge.linear.bias.abs().max() > 0
    limit = (2 * 64) ** -0.5
    assert 0.9 * limit < float(released.blocks[2].merge.linear.weight.max()) <= limit
    streams, context = embedded(residual, *inputs(residual))
    assert torch.equal(residual.run(streams, context)["image"], streams["image"])


@torch.no_grad()
def test_says_what_it_cannot_do() -> None:
    config, dit = plain_dit()
    streams, context = embedded(make("skip-dit"), *inputs(dit))
    with pytest.raises(UserError, match="long skip"):
        make("skip-dit").blocks[3].modulated_in(streams, context)
    lightning = LightningDiTConfig(**LATENT)
    with pytest.raises(UserError, match="made of a 'dit'; this model is a 'lightning-dit'"):
        from_dit(lightning, {})
    with pytest.raises(UserError, match="even"):
        from_dit(DiTConfig(**LATENT), {})
