"""Hunyuan-DiT beside diffusers' HunyuanDiT2DModel, and under the names of its official checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from ditloom.backbones.hunyuan_dit import PRESETS, HunyuanDiTConfig, rotary_of_grid
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign, save_foreign
from tests.hub.test_diffusers import T, close, latent, randomised

diffusers = pytest.importorskip("diffusers")

SIZES = [(8, 8), (12, 16), (6, 2)]
SMALL = {
    "depth": 6,
    "width": 96,
    "heads": 4,
    "image_size": 8,
    "text_width": 32,
    "text_tokens": 7,
    "t5_width": 16,
    "t5_tokens": 5,
    "pooled": 24,
}


def their_hunyuan(**more: Any) -> Any:
    settings = {
        "num_attention_heads": 4,
        "attention_head_dim": 24,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": 96,
        "num_layers": 6,
        "mlp_ratio": 4.3637,
        "cross_attention_dim": 32,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 24,
        "text_len": 7,
        "text_len_t5": 5,
        **more,
    }
    return randomised(diffusers.HunyuanDiT2DModel(**settings))


def told(sized: bool) -> Condition:
    g = torch.Generator().manual_seed(1)
    extra = {"t5": torch.randn(3, 5, 16, generator=g), "t5_mask": _mask(5, 4, 1)}
    if sized:
        extra["sizes"] = torch.tensor([[1024.0, 768, 512, 512, 0, 0], [64, 32, 9, 8, 7, 6], [1, 2, 3, 4, 5, 6]])
    return Condition(text=torch.randn(3, 7, 32, generator=g), text_mask=_mask(7, 3, 1), extra=extra)


def _mask(tokens: int, *lengths: int) -> Tensor:
    return torch.arange(tokens)[None] < torch.tensor([tokens, *lengths])[:, None]


def run(theirs: Any, x: Tensor, condition: Condition) -> Tensor:
    grid = (x.shape[-2] // 2, x.shape[-1] // 2)
    return theirs(
        x,
        1000 * T.float() - 1,
        encoder_hidden_states=condition.text,
        text_embedding_mask=condition.text_mask,
        encoder_hidden_states_t5=condition.extra["t5"],
        text_embedding_mask_t5=condition.extra["t5_mask"],
        image_meta_size=condition.extra.get("sizes"),
        style=torch.zeros(3, dtype=torch.int64),
        image_rotary_emb=rotary_of_grid(*grid, 32, 24, x.device),
        return_dict=False,
    )[0]


@pytest.mark.parametrize("sized", [False, True])
@torch.no_grad()
def test_from_diffusers(sized: bool, tmp_path: Path) -> None:
    theirs = their_hunyuan(use_style_cond_and_image_meta_size=sized)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_foreign(tmp_path / "theirs")
    for size in SIZES:
        y = run(theirs, latent(*size), told(sized))
        assert float(y.std()) > 0.1
        close(ours(latent(*size), T, told(sized)), y)


@pytest.mark.parametrize("sized", [False, True])
@torch.no_grad()
def test_to_diffusers(sized: bool, tmp_path: Path) -> None:
    config = HunyuanDiTConfig(**SMALL, sized=sized, learn_sigma=sized)
    ours = randomised(config.build())
    saved = save_foreign(ours, "diffusers-hunyuan-dit", tmp_path / "ours")
    theirs = diffusers.HunyuanDiT2DModel.from_pretrained(saved).eval()
    close(ours(latent(6, 10), T, told(sized)), run(theirs, latent(6, 10), told(sized)))
    again = load_foreign(saved)
    assert again.preset == config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("name", PRESETS)
def test_the_published_sizes_are_diffusers_shapes(name: str) -> None:
    from ditloom.hub.formats.diffusers_hunyuan_dit import DiffusersHunyuanDiT

    settings = {k: v for k, v in DiffusersHunyuanDiT().settings(PRESETS[name]).items() if k != "_class_name"}
    with torch.device("meta"):
        theirs = diffusers.HunyuanDiT2DModel(**settings).state_dict()
        ours = DiffusersHunyuanDiT.keymap.out(PRESETS[name].build().state_dict(), PRESETS[name])
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("base", [32, 5])
def test_square_grids_stand_where_the_pipeline_puts_them(base: int) -> None:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    ours = rotary_of_grid(6, 6, base, 24, torch.device("cpu"))
    theirs = get_2d_rotary_pos_embed(24, ((0, 0), (base, base)), (6, 6))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_other_grids_are_spaced_as_numpy_does_without_the_endpoint() -> None:
    """The official code: 9 x 4 tokens fitted into 32 x 32 are 32 x 14 of it, from row 0 and column 9 on."""
    cos, sin = rotary_of_grid(9, 4, 32, 24, torch.device("cpu"))
    rows, columns = numpy.linspace(0, 32, 9, endpoint=False), numpy.linspace(9, 23, 4, endpoint=False)
    omega = 10000.0 ** (-numpy.arange(0, 12, 2) / 12)
    for token, (i, j) in ((0, (0, 0)), (7, (1, 3)), (34, (8, 2))):
        angles = numpy.concatenate([numpy.repeat(columns[j] * omega, 2), numpy.repeat(rows[i] * omega, 2)])
        numpy.testing.assert_allclose(cos[token], numpy.cos(angles), atol=1e-6)
        numpy.testing.assert_allclose(sin[token], numpy.sin(angles), atol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_official_names_tell_every_setting(name: str) -> None:
    from ditloom.hub.format import Foreign
    from ditloom.hub.formats.hunyuan_dit import HunyuanDiTStateDict

    with torch.device("meta"):
        theirs = foreign_state_dict(PRESETS[name].build(), "hunyuan-dit")
    assert HunyuanDiTStateDict().recognises(Foreign(theirs))
    assert HunyuanDiTStateDict().config(Foreign(theirs)) == PRESETS[name]
    inputs = {"HunyuanDiT-g/2-v1.1": 1024 + 1536 + 1408, "HunyuanDiT-g/2-v1.2": 1024}[name]
    assert theirs["extra_embedder.0.weight"].shape == (4 * 1408, inputs)


def test_official_names_round_trip(tmp_path: Path) -> None:
    config = HunyuanDiTConfig(**{**SMALL, "image_size": 128}, sized=True)
    ours = randomised(config.build())
    again = load_foreign(save_foreign(ours, "hunyuan-dit", tmp_path / "pytorch_model_ema.pt"))
    assert again.preset == config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


def test_what_diffusers_cannot_hold_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pool_heads"):
        save_foreign(HunyuanDiTConfig(**SMALL, pool_heads=2).build(), "diffusers-hunyuan-dit", tmp_path / "a")
