"""diffusers' FluxTransformer2DModel side by side, in both directions, and the official names of the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.backbones.flux import PRESETS, FluxConfig
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign, save_foreign
from ditloom.parts.patches import patchify, unpack
from ditloom.parts.positions import grid_positions, with_axes
from tests.hub.test_diffusers import close, latent, randomised

diffusers = pytest.importorskip("diffusers")

SIZES = [(8, 8), (12, 16), (2, 6)]
T = torch.tensor([0.97, 0.4, 0.05], dtype=torch.float32)  # the numbers that the other side sees
GUIDANCE = torch.tensor([3.5, 1.0, 7.25])
CONFIG = FluxConfig(
    depth=2,
    single_depth=3,
    width=96,
    heads=4,
    channels=4,
    image_size=8,
    text_width=32,
    text_tokens=7,
    pooled_width=20,
    axes=(4, 8, 12),
)


def their_flux(guided: bool) -> Any:
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=20,
        guidance_embeds=guided,
        axes_dims_rope=(4, 8, 12),
    )
    return randomised(model)


def text(guided: bool, rows: int = 3, tokens: int = 7) -> Condition:
    g = torch.Generator().manual_seed(1)
    extra = {"guidance": GUIDANCE[:rows]} if guided else {}
    return Condition(
        text=torch.randn(rows, tokens, 32, generator=g), pooled=torch.randn(rows, 20, generator=g), extra=extra
    )


def run(theirs: Any, x: Tensor, condition: Condition, t: Tensor = T) -> Tensor:
    grid = (x.shape[-2] // 2, x.shape[-1] // 2)
    assert condition.text is not None
    y = theirs(
        patchify(x, 2),
        encoder_hidden_states=condition.text,
        pooled_projections=condition.pooled,
        timestep=t,
        img_ids=with_axes(grid_positions(*grid), 3).float(),
        txt_ids=torch.zeros(condition.text.shape[1], 3),
        guidance=condition.extra.get("guidance"),
        return_dict=False,
    )[0]
    return unpack(y, 2, grid)


@pytest.mark.parametrize("guided", [True, False])
@torch.no_grad()
def test_from_diffusers(guided: bool, tmp_path: Path) -> None:
    theirs = their_flux(guided)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_foreign(tmp_path / "theirs")
    assert (ours.preset.guidance is not None) == guided
    for size in SIZES:
        y = run(theirs, latent(*size), text(guided))
        assert float(y.std()) > 0.1
        close(ours(latent(*size), T, text(guided)), y)


@pytest.mark.parametrize("guided", [True, False])
@torch.no_grad()
def test_to_diffusers(guided: bool, tmp_path: Path) -> None:
    config = replace(CONFIG, guidance=3.5 if guided else None, width=64, axes=(4, 4, 8))
    ours = randomised(config.build())
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(save_foreign(ours, "diffusers-flux", tmp_path / "ours"))
    close(ours(latent(6, 10), T, text(guided)), run(theirs.eval(), latent(6, 10), text(guided)))
    again = load_foreign(tmp_path / "ours")
    sizes = {"image_size": config.image_size, "text_tokens": config.text_tokens}
    assert replace(again.preset, **sizes) == config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


@torch.no_grad()
def test_masked_text_is_text_that_is_not_there(tmp_path: Path) -> None:
    theirs = their_flux(False)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, full = load_foreign(tmp_path / "theirs"), text(False)
    lengths = [7, 4, 1]
    mask = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    y = ours(latent(), T, replace(full, text_mask=mask))
    for i, n in enumerate(lengths):
        row = full.rows(slice(i, i + 1))
        assert row.text is not None
        close(y[i : i + 1], run(theirs, latent()[i : i + 1], replace(row, text=row.text[:, :n]), T[i : i + 1]))


@torch.no_grad()
def test_the_official_names_hold_the_same_model(tmp_path: Path) -> None:
    """A converted file is what it was; the fused matrices of single blocks are found by their own arithmetic."""
    config = replace(CONFIG, guidance=3.5, width=512, heads=4, axes=(16, 56, 56), depth=1, single_depth=2)
    ours = randomised(config.build())
    theirs = foreign_state_dict(ours, "flux")
    assert theirs["single_blocks.1.linear1.weight"].shape == (7 * 512, 512)
    assert theirs["single_blocks.1.linear2.weight"].shape == (512, 5 * 512)
    again = load_foreign(save_foreign(ours, "flux", tmp_path / "flux1.safetensors"))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())
    assert again.preset.guidance == 3.5

    h = torch.randn(3, 5, 512)
    block: Any = ours.blocks[3]
    qkv, hidden = torch.nn.functional.linear(
        h, theirs["single_blocks.1.linear1.weight"], theirs["single_blocks.1.linear1.bias"]
    ).split([3 * 512, 4 * 512], dim=-1)
    close(qkv, block.attn.qkv(h))
    both = torch.cat([h, torch.nn.functional.gelu(hidden, approximate="tanh")], dim=-1)
    fused = torch.nn.functional.linear(
        both, theirs["single_blocks.1.linear2.weight"], theirs["single_blocks.1.linear2.bias"]
    )
    torch.testing.assert_close(fused, block.attn.proj(h) + block.mlp(h), rtol=1e-4, atol=1e-4)


def test_what_a_file_cannot_tell_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="heads of 24"):
        load_foreign(foreign_state_dict(CONFIG.build(), "flux"))
    with pytest.raises(UserError, match="patch = 2"):
        save_foreign(replace(CONFIG, patch=1).build(), "diffusers-flux", tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_the_published_sizes_are_diffusers_shapes(name: str) -> None:
    from ditloom.hub.formats.diffusers_flux import DiffusersFlux

    config = PRESETS[name]
    settings = {k: v for k, v in DiffusersFlux().settings(config).items() if k != "_class_name"}
    with torch.device("meta"):
        theirs = diffusers.FluxTransformer2DModel(**settings).state_dict()
        ours = DiffusersFlux.keymap.out(config.build().state_dict(), config)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_the_official_file_has_780_tensors() -> None:
    """flux1-dev.safetensors: 19 x 24 in double blocks, 38 x 8 in single ones, 20 around them."""
    with torch.device("meta"):
        theirs = foreign_state_dict(PRESETS["FLUX.1-dev"].build(), "flux")
    assert len(theirs) == 19 * 24 + 38 * 8 + 20 == 780
    shapes = {"img_in.weight": (3072, 64), "single_blocks.37.linear1.weight": (21504, 3072)}
    assert {key: tuple(theirs[key].shape) for key in shapes} == shapes
