"""Latte beside diffusers' LatteTransformer3DModel, and the official class-conditional module's own numbers.

Golden numbers: tensor j of the sorted names (tables excluded) is `formula(shape, j, 0.3)`; x [3, 2, 5, 6, 6] is tensor
1000 at scale 1.5; native times 998, 420, 13; labels 3, 10 (none), 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.backbones.latte import PRESETS, LatteConfig
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign, save_foreign
from ditloom.hub.format import Foreign
from ditloom.hub.formats.diffusers_latte import DiffusersLatte
from ditloom.hub.formats.latte import LatteStateDict
from tests.hub.test_diffusers import T, close, randomised
from tests.hub.test_golden import formula

diffusers = pytest.importorskip("diffusers")

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("latte.json").read_text())
SIZES = [(3, 8, 8), (3, 12, 4), (1, 6, 10)]
TEXT: dict[str, Any] = {"depth": 4, "width": 96, "heads": 4, "image_size": 8, "frames": 3, "text_width": 32}
PLAIN: dict[str, Any] = {"depth": 4, "width": 48, "heads": 2, "image_size": 6, "frames": 5, "channels": 2}
CONFIGS = {"classes": LatteConfig(**PLAIN, classes=10), "plain": LatteConfig(**PLAIN, learn_sigma=False)}


def their_latte(**more: Any) -> Any:
    settings = {**DiffusersLatte().settings(LatteConfig(**TEXT)), **more}
    return randomised(diffusers.LatteTransformer3DModel(**{k: v for k, v in settings.items() if k != "_class_name"}))


def video(frames: int, height: int, width: int) -> Tensor:
    return torch.randn(3, 4, frames, height, width, generator=torch.Generator().manual_seed(2))


def text() -> Condition:
    states = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1))
    return Condition(text=states, text_mask=torch.arange(7)[None] < torch.tensor([7, 4, 1])[:, None])


def run(theirs: Any, x: Tensor, condition: Condition) -> Tensor:
    mask = condition.text_mask.to(x.dtype)  # type: ignore[union-attr]
    # that port repeats the text for every frame, and leaves the mask to be given for every frame as a bias
    bias = ((1 - mask) * -10000.0)[:, None].repeat_interleave(x.shape[2], 0)
    return theirs(
        x,
        timestep=1000 * T.float() - 1,
        encoder_hidden_states=condition.text,
        encoder_attention_mask=bias,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("size", [8, 136])
@torch.no_grad()
def test_from_diffusers(size: int, tmp_path: Path) -> None:
    theirs = their_latte(sample_size=size)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_foreign(tmp_path / "theirs")
    assert ours.preset.interpolation == max(size // 64, 1)
    for shape in SIZES:
        y = run(theirs, video(*shape), text())
        assert float(y.std()) > 0.1
        close(ours(video(*shape), T, text()), y)


@torch.no_grad()
def test_to_diffusers(tmp_path: Path) -> None:
    config = LatteConfig(**{**TEXT, "depth": 6}, learn_sigma=False)
    ours = randomised(config.build())
    saved = save_foreign(ours, "diffusers-latte", tmp_path / "ours")
    theirs = diffusers.LatteTransformer3DModel.from_pretrained(saved).eval()
    close(ours(video(3, 6, 10), T, text()), run(theirs, video(3, 6, 10), text()))
    again = load_foreign(saved)
    assert again.preset == config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


def test_the_published_size_is_diffusers_shapes() -> None:
    config = PRESETS["Latte-1-T2V"]
    settings = {k: v for k, v in DiffusersLatte().settings(config).items() if k != "_class_name"}
    with torch.device("meta"):
        theirs = diffusers.LatteTransformer3DModel(**settings).state_dict()
        ours = DiffusersLatte.keymap.out(config.build().state_dict(), config)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_diffusers_has_only_the_text_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this Latte is not"):
        save_foreign(CONFIGS["classes"].build(), "diffusers-latte", tmp_path / "a")


def filled(name: str) -> dict[str, Tensor]:
    theirs = foreign_state_dict(CONFIGS[name].build(), "latte")
    learned = sorted(k for k in theirs if k not in ("pos_embed", "temp_embed"))
    return {**theirs, **{k: formula(tuple(theirs[k].shape), j, 0.3) for j, k in enumerate(learned)}}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_computes_what_the_official_module_computes(name: str) -> None:
    golden, config, theirs = GOLDEN[name], CONFIGS[name], filled(name)
    assert len(theirs) == golden["tensors"] + 2
    backbone = load_foreign(theirs, config, "latte")
    t = config.time.noise_level(torch.tensor([998.0, 420.0, 13.0]))
    label = torch.tensor([3, 10, 0]) if config.classes else None
    y = backbone(formula((3, 2, 5, 6, 6), 1000, 1.5), t, Condition(label=label))
    expected = torch.tensor(golden["output"]).reshape(golden["shape"])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["Latte-S/4", "Latte-XL/2-UCF101"])
def test_official_names_tell_every_setting(name: str) -> None:
    config = PRESETS[name]
    with torch.device("meta"):
        theirs = LatteStateDict.keymap.out(config.build().state_dict(), config)
    assert LatteStateDict().recognises(Foreign(theirs))
    assert LatteStateDict().config(Foreign(theirs)) == config


def test_another_table_is_refused() -> None:
    theirs = filled("plain")
    theirs["temp_embed"] = theirs["temp_embed"] + 0.1
    with pytest.raises(UserError, match="table of frames"):
        load_foreign(theirs, CONFIGS["plain"], "latte")
