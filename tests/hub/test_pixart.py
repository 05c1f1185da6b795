"""PixArt beside diffusers' PixArtTransformer2DModel, and under the names of its official checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.backbones.pixart_sigma import PRESETS, PixArtConfig
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign, save_foreign
from tests.hub.test_diffusers import T, close, latent, randomised

diffusers = pytest.importorskip("diffusers")

SIZES = [(8, 8), (12, 16), (2, 6)]
KINDS: dict[str, dict[str, Any]] = {
    "sigma": {"interpolation_scale": 0.5},
    "alpha": {"use_additional_conditions": True, "interpolation_scale": 2},
    "default-scale": {"out_channels": 4},
}
SMALL = {"depth": 3, "width": 96, "heads": 4, "image_size": 8, "text_width": 32, "text_tokens": 300}


def their_pixart(**more: Any) -> Any:
    settings = {
        "num_attention_heads": 4,
        "attention_head_dim": 24,
        "in_channels": 4,
        "num_layers": 3,
        "cross_attention_dim": 96,
        "sample_size": 8,
        "caption_channels": 32,
        **more,
    }
    return randomised(diffusers.PixArtTransformer2DModel(**settings))


def told(rows: int = 3) -> dict[str, Tensor]:
    size = torch.tensor([[512.0, 768.0], [1024.0, 1024.0], [300.0, 700.0]])[:rows]
    return {"size": size, "aspect": size[:, :1] / size[:, 1:]}


def text(**extra: Tensor) -> Condition:
    states = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(7)[None] < torch.tensor([7, 4, 1])[:, None]
    return Condition(text=states, text_mask=mask, extra=extra)


def run(theirs: Any, x: Tensor, condition: Condition) -> Tensor:
    extra = {"resolution": condition.extra.get("size"), "aspect_ratio": condition.extra.get("aspect")}
    return theirs(
        x,
        encoder_hidden_states=condition.text,
        encoder_attention_mask=condition.text_mask.to(x.dtype),  # type: ignore[union-attr]
        timestep=1000 * T.float() - 1,
        added_cond_kwargs=extra,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_from_diffusers(kind: str, tmp_path: Path) -> None:
    theirs = their_pixart(**KINDS[kind])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_foreign(tmp_path / "theirs")
    condition = text(**told()) if kind == "alpha" else text()
    for size in SIZES:
        y = run(theirs, latent(*size), condition)
        assert float(y.std()) > 0.1
        close(ours(latent(*size), T, condition), y)


@pytest.mark.parametrize("sized", [False, True])
@torch.no_grad()
def test_to_diffusers(sized: bool, tmp_path: Path) -> None:
    config = PixArtConfig(**SMALL, sized=sized, interpolation=2.0)
    ours, condition = randomised(config.build()), text(**told()) if sized else text()
    saved = save_foreign(ours, "diffusers-pixart", tmp_path / "ours")
    theirs = diffusers.PixArtTransformer2DModel.from_pretrained(saved).eval()
    close(ours(latent(6, 10), T, condition), run(theirs, latent(6, 10), condition))
    again = load_foreign(saved)
    assert again.preset == config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("name", ["PixArt-Sigma-XL/2-2K-MS", "PixArt-alpha-XL/2-1024-MS"])
def test_the_published_sizes_are_diffusers_shapes(name: str) -> None:
    from ditloom.hub.formats.diffusers_pixart import DiffusersPixArt

    settings = {k: v for k, v in DiffusersPixArt().settings(PRESETS[name]).items() if k != "_class_name"}
    with torch.device("meta"):
        theirs = diffusers.PixArtTransformer2DModel(**settings).state_dict()
        ours = DiffusersPixArt.keymap.out(PRESETS[name].build().state_dict(), PRESETS[name])
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_what_diffusers_cannot_hold_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="compressed"):
        save_foreign(PixArtConfig(**SMALL, compressed=(1,)).build(), "diffusers-pixart", tmp_path / "a")


def test_official_names_and_a_table_nobody_reads(tmp_path: Path) -> None:
    config = PixArtConfig(**SMALL, null_tokens=300, compressed=(1, 2), qk_norm="layer-affine-full")
    ours = randomised(config.build())
    path = save_foreign(ours, "pixart", tmp_path / "PixArt-Sigma-XL-2-1024-MS.pth")
    with pytest.raises(UserError, match="heads cannot be read"):
        load_foreign(path)
    again = load_foreign(path, config)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())
    held = {**foreign_state_dict(ours, "pixart"), "pos_embed": torch.zeros(1, 16, 96)}
    assert load_foreign(held, config).preset == config  # a table that the network does not read


@pytest.mark.parametrize(
    ("file", "preset"),
    [("PixArt-Sigma-XL-2-256x256", "PixArt-Sigma-XL/2-256-MS"), ("PixArt-XL-2-256x256", "PixArt-alpha-XL/2-256")]
    + [(n.replace("alpha-", "").replace("/", "-"), n) for n in PRESETS if "256" not in n],
)
def test_a_file_name_tells_the_size(file: str, preset: str) -> None:
    from ditloom.hub.format import Foreign
    from ditloom.hub.formats.pixart import PixArtStateDict

    config = replace(PRESETS[preset], null_tokens=PRESETS[preset].text_tokens)
    with torch.device("meta"):
        theirs = PixArtStateDict.keymap.out(config.build().state_dict(), config)
    given = Foreign(theirs, model=file)
    assert PixArtStateDict().recognises(given)
    assert PixArtStateDict().config(given) == config


def test_an_unnamed_file_is_asked_for_its_size() -> None:
    config = PixArtConfig(**SMALL, null_tokens=300)
    with pytest.raises(UserError, match="size that .* cannot be read"):
        load_foreign(foreign_state_dict(config.build(), "pixart"))
