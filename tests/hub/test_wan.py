"""Wan beside diffusers' WanTransformer3DModel, and the official module's own numbers.

Golden numbers: tensor j of the sorted names is `formula(shape, j, 0.3)`; x [3, 3, 4, 6, 10] is tensor 1000, text
[3, 7, 20] tensor 1001, at scale 1.5, of which rows have 7, 4 and 1 tokens; native times 970, 400, 25. The official
sinusoid is in float64, ours in float32 as diffusers'.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.backbones.wan import PRESETS, WanConfig
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign, save_foreign
from ditloom.hub.format import Foreign
from ditloom.hub.formats.diffusers_wan import DiffusersWan
from ditloom.hub.formats.wan import WanStateDict
from tests.hub.test_diffusers import T, close, randomised
from tests.hub.test_golden import formula

diffusers = pytest.importorskip("diffusers")

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("wan.json").read_text())["t2v"]
SIZES = [(2, 8, 8), (3, 12, 4), (1, 6, 10)]
SMALL: dict[str, Any] = {"depth": 3, "width": 80, "heads": 4, "hidden": 96, "text_width": 32, "text_tokens": 9}


def their_wan(config: WanConfig) -> Any:
    settings = {k: v for k, v in DiffusersWan().settings(config).items() if k != "_class_name"}
    return randomised(diffusers.WanTransformer3DModel(**settings))


def video(frames: int, height: int, width: int) -> Tensor:
    return torch.randn(3, 4, frames, height, width, generator=torch.Generator().manual_seed(2))


def text(tokens: int = 7) -> Condition:
    states = torch.randn(3, tokens, 32, generator=torch.Generator().manual_seed(1))
    return Condition(text=states, text_mask=torch.arange(tokens)[None] < torch.tensor([tokens, 4, 1])[:, None])


def padded(condition: Condition, tokens: int = 9) -> Tensor:
    """What the pipeline hands over: zeros where there is no text."""
    assert condition.text is not None
    assert condition.text_mask is not None
    given = condition.text * condition.text_mask[..., None]
    return torch.nn.functional.pad(given, (0, 0, 0, tokens - given.shape[1]))


def run(theirs: Any, x: Tensor, condition: Condition, t: Tensor = T) -> Tensor:
    return theirs(x, (1000 * t).float(), padded(condition), return_dict=False)[0]


@torch.no_grad()
def test_from_diffusers(tmp_path: Path) -> None:
    theirs = their_wan(WanConfig(**SMALL, channels=4))
    theirs.save_pretrained(tmp_path / "theirs")
    read = load_foreign(tmp_path / "theirs")
    assert read.preset.text_tokens == 512
    ours = load_foreign(tmp_path / "theirs", WanConfig(**SMALL, channels=4))
    for size in SIZES:
        y = run(theirs, video(*size), text())
        assert float(y.std()) > 0.1
        close(ours(video(*size), T, text()), y)


@torch.no_grad()
def test_a_time_per_token_as_diffusers_has_it() -> None:
    config = WanConfig(**SMALL, channels=4)
    theirs = their_wan(config)
    ours = load_foreign(theirs.state_dict(), config)
    t = torch.rand(3, 2 * 4 * 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    close(ours(video(2, 8, 8), t, text()), run(theirs, video(2, 8, 8), text(), t))


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 2)])
@torch.no_grad()
def test_to_diffusers(patch: tuple[int, int, int], tmp_path: Path) -> None:
    config = WanConfig(**SMALL, channels=4, patch=patch)
    ours = randomised(config.build())
    saved = save_foreign(ours, "diffusers-wan", tmp_path / "ours")
    theirs = diffusers.WanTransformer3DModel.from_pretrained(saved).eval()
    close(ours(video(2, 6, 10), T, text()), run(theirs, video(2, 6, 10), text()))
    again = load_foreign(saved)
    assert again.preset == WanConfig(**{**SMALL, "text_tokens": 512}, channels=4, patch=patch)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("name", PRESETS)
def test_the_published_sizes_are_diffusers_shapes(name: str) -> None:
    config = PRESETS[name]
    settings = {k: v for k, v in DiffusersWan().settings(config).items() if k != "_class_name"}
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel(**settings).state_dict()
        ours = DiffusersWan.keymap.out(config.build().state_dict(), config)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_official_names_tell_every_setting(name: str) -> None:
    from dataclasses import replace

    with torch.device("meta"):
        theirs = foreign_state_dict(PRESETS[name].build(), "wan")
    assert WanStateDict().recognises(Foreign(theirs))
    assert WanStateDict().config(Foreign(theirs)) == replace(PRESETS[name], size=(21, 60, 104))


@torch.no_grad()
def test_computes_what_the_official_module_computes() -> None:
    config = WanConfig(**{**SMALL, "text_width": 20, "text_tokens": 7}, channels=3)
    theirs = foreign_state_dict(config.build(), "wan")
    theirs = {k: formula(tuple(theirs[k].shape), j, 0.3) for j, k in enumerate(sorted(theirs))}
    assert len(theirs) == GOLDEN["tensors"]
    backbone = load_foreign(theirs, config)
    mask = torch.arange(7)[None] < torch.tensor(GOLDEN["lengths"])[:, None]
    condition = Condition(text=formula((3, 7, 20), 1001, 1.5), text_mask=mask)
    t = config.time.noise_level(torch.tensor(GOLDEN["time"]))
    y = backbone(formula((3, 3, 4, 6, 10), 1000, 1.5), t, condition)
    expected = torch.tensor(GOLDEN["output"]).reshape(GOLDEN["shape"])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_keys_of_an_image_to_video_model_are_named() -> None:
    config = WanConfig(**SMALL, channels=4)
    theirs = foreign_state_dict(config.build(), "wan")
    theirs["blocks.0.cross_attn.k_img.weight"] = torch.zeros(80, 80)
    with pytest.raises(UserError, match="1 extra: blocks.0.cross_attn.k_img.weight"):
        load_foreign(theirs, config)
