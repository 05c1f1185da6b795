"""SANA beside diffusers' SanaTransformer2DModel, and under the names of its official checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.backbones.sana import PRESETS, SanaConfig
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign, save_foreign
from ditloom.hub.formats.diffusers_sana import DiffusersSana
from tests.hub.test_diffusers import T, close, latent, randomised

diffusers = pytest.importorskip("diffusers")

SIZES = [(8, 8), (6, 10), (3, 5)]
KINDS: dict[str, dict[str, Any]] = {"sana": {}, "sana-1.5": {"qk_norm": "rms_norm_across_heads"}}
SMALL = {"depth": 3, "width": 48, "heads": 6, "cross_heads": 3, "channels": 4, "text_width": 32, "image_size": 8}


def their_sana(**more: Any) -> Any:
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 6,
        "attention_head_dim": 8,
        "num_layers": 3,
        "num_cross_attention_heads": 3,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 48,
        "caption_channels": 32,
        "sample_size": 8,
        **more,
    }
    return randomised(diffusers.SanaTransformer2DModel(**settings))


def text() -> Condition:
    states = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1))
    return Condition(text=states, text_mask=torch.arange(7)[None] < torch.tensor([7, 4, 1])[:, None])


def run(theirs: Any, x: Tensor, condition: Condition) -> Tensor:
    assert condition.text_mask is not None
    return theirs(
        x,
        encoder_hidden_states=condition.text,
        encoder_attention_mask=condition.text_mask.to(x.dtype),
        timestep=1000 * T.float(),
        return_dict=False,
    )[0]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_from_diffusers(kind: str, tmp_path: Path) -> None:
    theirs = their_sana(**KINDS[kind])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_foreign(tmp_path / "theirs")
    assert ours.preset.qk_norm == (kind == "sana-1.5")
    for size in SIZES:
        y = run(theirs, latent(*size), text())
        assert float(y.std()) > 0.1
        close(ours(latent(*size), T, text()), y)


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_to_diffusers(qk_norm: bool, tmp_path: Path) -> None:
    config = SanaConfig(**SMALL, qk_norm=qk_norm, patch=2, mlp_ratio=2.0)
    ours = randomised(config.build())
    saved = save_foreign(ours, "diffusers-sana", tmp_path / "ours")
    theirs = diffusers.SanaTransformer2DModel.from_pretrained(saved).eval()
    close(ours(latent(6, 10), T, text()), run(theirs, latent(6, 10), text()))
    again = load_foreign(saved)
    assert again.preset == config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


@torch.no_grad()
def test_the_official_names_as_diffusers_reads_them() -> None:
    """diffusers has a table of its own from the official names to its own."""
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    ours = randomised(SanaConfig(**SMALL, null_tokens=5).build())
    official = {**foreign_state_dict(ours, "sana"), "pos_embed": torch.zeros(1, 16, 48)}
    loaded = load_foreign(official, ours.preset, "sana")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in ours.state_dict().items())
    theirs = their_sana()
    theirs.load_state_dict(utils.convert_sana_transformer_to_diffusers(dict(official)), strict=True)
    close(ours(latent(6, 10), T, text()), run(theirs, latent(6, 10), text()))


@pytest.mark.parametrize("name", PRESETS)
def test_the_published_sizes_are_diffusers_shapes(name: str) -> None:
    config = PRESETS[name]
    settings = {k: v for k, v in DiffusersSana().settings(config).items() if k != "_class_name"}
    with torch.device("meta"):
        theirs = diffusers.SanaTransformer2DModel(**settings).state_dict()
        ours = DiffusersSana.keymap.out(config.build().state_dict(), config)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_what_is_not_supported_is_said(tmp_path: Path) -> None:
    their_sana(interpolation_scale=2).save_pretrained(tmp_path / "4k")
    with pytest.raises(UserError, match="positions"):
        load_foreign(tmp_path / "4k")
    with pytest.raises(UserError, match="null_tokens"):
        save_foreign(SanaConfig(**SMALL, null_tokens=5).build(), "diffusers-sana", tmp_path / "ours")
    with pytest.raises(UserError, match="no published SANA has depth 3"):
        load_foreign(foreign_state_dict(SanaConfig(**SMALL).build(), "sana"))
