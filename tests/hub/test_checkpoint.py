"""Files: the right ones load bit for bit; every wrong one is refused in one sentence and nothing in it is run."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditloom.backbones.dit import DiTConfig
from ditloom.backbones.lightning_dit import LightningDiTConfig
from ditloom.backbones.sit import SiTConfig
from ditloom.backbones.u_vit import UViTConfig
from ditloom.contracts.backbone import Backbone
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign, save_foreign
from ditloom.hub.formats import FORMATS

SMALL = {"depth": 2, "width": 48, "heads": 2, "image_size": 4, "classes": 10}
MODELS: dict[str, Any] = {
    "facebook-dit": DiTConfig(**SMALL),
    "sit": SiTConfig(**SMALL),
    "lightning-dit": LightningDiTConfig(**SMALL, channels=3, qk_norm=True),
    "u-vit": UViTConfig(**SMALL),
}


def build(name: str) -> Backbone:
    torch.manual_seed(0)
    backbone = MODELS[name].build()
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return backbone


@pytest.fixture
def dit() -> Backbone:
    return build("facebook-dit")


@pytest.fixture
def theirs(dit: Backbone) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in foreign_state_dict(dit, "facebook-dit").items()}


def same(a: Backbone, b: Backbone) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in mine.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("name", MODELS)
def test_written_and_read_bit_for_bit(name: str, suffix: str, tmp_path: Path) -> None:
    backbone = build(name)
    path = save_foreign(backbone, name, tmp_path / f"model{suffix}")
    loaded = load_foreign(path, MODELS[name])
    assert same(loaded, backbone)
    before = foreign_state_dict(backbone, name)
    again = foreign_state_dict(loaded, name)
    assert all(torch.equal(v, again[k]) for k, v in before.items())
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_stays_half(name: str, tmp_path: Path) -> None:
    backbone = build(name).to(torch.bfloat16)
    loaded = load_foreign(save_foreign(backbone, name, tmp_path / "model.safetensors"), MODELS[name])
    assert loaded.dtype is torch.bfloat16
    assert same(loaded, backbone)


def test_every_tensor_of_a_model_has_a_place_in_its_formats() -> None:
    for name, config in MODELS.items():
        with torch.device("meta"):
            theirs = foreign_state_dict(config.build(), name)
        assert len(theirs) >= len(config.build().state_dict())
    assert set(MODELS) <= set(FORMATS.names())


def test_published_sizes_need_no_configuration() -> None:
    state = foreign_state_dict(DiTConfig(depth=12, width=384, heads=6, image_size=8).build(), "facebook-dit")
    preset = load_foreign(state, format="facebook-dit").preset
    assert preset == DiTConfig(depth=12, width=384, heads=6, image_size=8)


def test_a_training_checkpoint_gives_its_ema(dit: Backbone, theirs: dict[str, Tensor], tmp_path: Path) -> None:
    """What train.py of DiT and SiT writes: {model, ema, opt, args}, args being an argparse.Namespace."""
    raw = {f"module.{k}": torch.zeros_like(v) for k, v in theirs.items()}
    held = {"model": raw, "ema": theirs, "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-S/2")}
    torch.save(held, tmp_path / "0400000.pt")
    assert same(load_foreign(tmp_path / "0400000.pt", dit.preset), dit)


def test_prefixes_of_wrappers_are_taken_off(dit: Backbone, theirs: dict[str, Tensor]) -> None:
    wrapped = {f"module._orig_mod.{k}": v for k, v in theirs.items()}
    assert same(load_foreign(wrapped, dit.preset), dit)


def test_the_callers_tensors_stay_his(dit: Backbone, theirs: dict[str, Tensor]) -> None:
    loaded = load_foreign(theirs, dit.preset)
    with torch.no_grad():
        loaded.x_embedder.proj.bias.add_(1)
    assert torch.equal(theirs["x_embedder.proj.bias"], dit.x_embedder.proj.bias)


@pytest.mark.parametrize(
    ("file", "family"), [("SiT-XL-2-256.pt", "sit"), ("DiT-XL-2-256x256.pt", "dit"), ("0400000.pt", None)]
)
def test_dit_and_sit_are_told_apart_by_name_or_not_at_all(
    file: str, family: str | None, theirs: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditloom.hub.formats.facebook_dit.known_heads", lambda *args: 2)
    torch.save(theirs, tmp_path / file)
    if family is not None:
        assert load_foreign(tmp_path / file).preset.family == family
        return
    with pytest.raises(UserError, match="'facebook-dit' or 'sit'"):
        load_foreign(tmp_path / file)
    assert load_foreign(tmp_path / file, format="sit").preset.family == "sit"


Spoil = Callable[[dict[str, Tensor]], Any]
FAULTS: dict[str, tuple[Spoil, str]] = {
    "missing": (lambda s: s.pop("blocks.1.attn.qkv.weight"), "1 missing: blocks.1.attn.qkv.weight"),
    "renamed": (
        lambda s: s.update({"blocks.1.attn.qvk.bias": s.pop("blocks.1.attn.qkv.bias")}),
        r"nearest: blocks.1.attn.qvk.bias\); 1 extra: blocks.1.attn.qvk.bias",
    ),
    "extra": (lambda s: s.update({"head.weight": torch.zeros(2)}), "1 extra: head.weight"),
    "mis-shaped": (
        lambda s: s.update({"blocks.0.mlp.fc1.bias": torch.zeros(7)}),
        r"blocks.0.mlp.fc1.bias is \[7\] and should be \[192\]",
    ),
    "many": (lambda s: [s.pop(k) for k in list(s) if ".mlp." in k], "12 missing: .* and 9 more"),
    "table": (lambda s: s["pos_embed"].add_(0.5), "pos_embed in the checkpoint is not the sine-cosine"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_state_dict_is_named(fault: str, dit: Backbone, theirs: dict[str, Tensor]) -> None:
    spoil, message = FAULTS[fault]
    spoil(theirs)
    with pytest.raises(UserError, match=message) as error:
        load_foreign(theirs, dit.preset)
    assert "\n" not in str(error.value)


def test_a_stranger_is_named() -> None:
    with pytest.raises(UserError, match="none of the known formats.*conv_in.weight"):
        load_foreign({"conv_in.weight": torch.zeros(1)})


def test_the_wrong_configuration_is_named(dit: Backbone, theirs: dict[str, Tensor]) -> None:
    with pytest.raises(UserError, match="missing: blocks.2"):
        load_foreign(theirs, DiTConfig(**{**SMALL, "depth": 3}))
    with pytest.raises(UserError, match="configuration is for 'u-vit'"):
        load_foreign(theirs, MODELS["u-vit"], "facebook-dit")
    with pytest.raises(UserError, match="heads cannot be read"):
        load_foreign(theirs, format="facebook-dit")
    with pytest.raises(UnknownName, match="facebook-dit"):
        load_foreign(theirs, format="facebook")
    with pytest.raises(UserError, match="for the family 'u-vit'"):
        save_foreign(dit, "u-vit", "nowhere.pt")


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(
    protocol: str, theirs: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    held = {"ema": theirs, "args": Bomb()}
    if protocol == "torch":
        torch.save(held, "bomb.pt")
    else:
        Path("bomb.pt").write_bytes(pickle.dumps(held))
    with pytest.raises(UserError, match="holds Python code"):
        load_foreign("bomb.pt")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(suffix: str, share: float, dit: Backbone, tmp_path: Path) -> None:
    path = save_foreign(dit, "facebook-dit", tmp_path / f"model{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="is not a whole") as error:
        load_foreign(path, dit.preset)
    assert "\n" not in str(error.value)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    torch.save([1, 2], tmp_path / "list.pt")
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name, message in (
        ("nothing.pt", "no checkpoint at"),
        ("notes.txt", "neither"),
        ("broken", "not JSON"),
        ("list.pt", "no state dict"),
        ("other.safetensors", "none of the known formats"),
    ):
        with pytest.raises(UserError, match=message):
            load_foreign(tmp_path / name)


def test_a_folder_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    backbone = DiTConfig(**SMALL, frequency_shift=1).build()
    save_foreign(backbone, "diffusers-dit", tmp_path / "model")
    written = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="exists already"):
        save_foreign(backbone, "diffusers-dit", tmp_path / "model")
    assert len(written) == len(load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors"))
    assert os.listdir(tmp_path) == ["model"]


def test_an_unwritable_place_is_one_sentence(dit: Backbone, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write"):
        save_foreign(dit, "facebook-dit", tmp_path / "file" / "model.pt")
