"""Wan beside diffusers' WanTransformer3DModel, and the official module's own numbers.

Golden numbers: tensor j of the sorted names is `formula(shape, j, 0.3)`, 0.2 for images to video; x [3, 3, 4, 6, 10] is
tensor 1000, text [3, 7, 20] tensor 1001, the given video 1002, CLIP's states [3, 5, 1280] 1003, at scale 1.5; rows have
7, 4 and 1 text tokens; native times 970, 400, 25. The official sinusoid is in float64, ours in float32 as diffusers'.
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

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("wan.json").read_text())
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


IMAGE = WanConfig(
    **{**SMALL, "text_tokens": 512}, channels=4, image_width=20, given=3
)  # that port reads 512 text tokens


def with_image() -> Condition:
    g = torch.Generator().manual_seed(4)
    extra = {"image": torch.randn(3, 5, 20, generator=g), "given": torch.randn(3, 3, 2, 6, 10, generator=g)}
    return Condition(text=text().text, text_mask=text().text_mask, extra=extra)


def run_with_image(theirs: Any, x: Tensor, condition: Condition) -> Tensor:
    image, given = condition.extra["image"], condition.extra["given"]
    whole = torch.cat([x, given], dim=1)
    return theirs(whole, (1000 * T).float(), padded(condition, 512), image, return_dict=False)[0]


@torch.no_grad()
def test_images_to_video_both_ways(tmp_path: Path) -> None:
    theirs, x, condition = their_wan(IMAGE), video(2, 6, 10), with_image()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_foreign(tmp_path / "theirs")
    assert ours.preset == IMAGE
    y = run_with_image(theirs, x, condition)
    assert float(y.std()) > 0.1
    close(ours(x, T, condition), y)
    ours = randomised(IMAGE.build())
    theirs = diffusers.WanTransformer3DModel.from_pretrained(save_foreign(ours, "diffusers-wan", tmp_path / "ours"))
    close(ours(x, T, condition), run_with_image(theirs.eval(), x, condition))
    official = load_foreign(foreign_state_dict(ours, "wan"), IMAGE)
    assert all(torch.equal(v, official.state_dict()[k]) for k, v in ours.state_dict().items())


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


OFFICIAL = {**SMALL, "text_width": 20, "text_tokens": 7, "channels": 3}
CONFIGS = {
    "t2v": (WanConfig(**OFFICIAL), 0.3),
    "i2v": (WanConfig(**{**OFFICIAL, "depth": 2}, image_width=1280, given=3), 0.2),
}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_computes_what_the_official_module_computes(name: str) -> None:
    golden, (config, scale) = GOLDEN[name], CONFIGS[name]
    theirs = foreign_state_dict(config.build(), "wan")
    theirs = {k: formula(tuple(theirs[k].shape), j, scale) for j, k in enumerate(sorted(theirs))}
    assert len(theirs) == golden["tensors"]
    backbone = load_foreign(theirs, config)
    mask = torch.arange(7)[None] < torch.tensor(golden["lengths"])[:, None]
    extra = {"given": formula((3, 3, 4, 6, 10), 1002, 1.5), "image": formula((3, 5, 1280), 1003, 1.5)}
    condition = Condition(text=formula((3, 7, 20), 1001, 1.5), text_mask=mask, extra=extra if config.given else {})
    t = config.time.noise_level(torch.tensor(golden["time"]))
    y = backbone(formula((3, 3, 4, 6, 10), 1000, 1.5), t, condition)
    expected = torch.tensor(golden["output"]).reshape(golden["shape"])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_keys_of_an_image_to_video_model_are_named() -> None:
    config = WanConfig(**SMALL, channels=4)
    theirs = foreign_state_dict(config.build(), "wan")
    theirs["blocks.0.cross_attn.k_img.weight"] = torch.zeros(80, 80)
    with pytest.raises(UserError, match="1 extra: blocks.0.cross_attn.k_img.weight"):
        load_foreign(theirs, config)
