"""`train`, `evaluate`, `estimate`, `convert`: from a recipe to numbers, through the front door."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ditloom.cli.overrides import overridden
from ditloom.contracts.errors import UserError
from ditloom.hub.checkpoint import load_foreign
from ditloom.loading import load
from tests.cli.tiny import tiny


@pytest.fixture
def recipe(tmp_path):
    """A recipe on 24 pictures of red and blue squares, 8 of them for testing."""
    for split, number in (("train", 8), ("test", 4)):
        for name, colour in (("red", (250, 30, 30)), ("blue", (30, 30, 250))):
            for index in range(number):
                pixels = np.full((8, 8, 3), 255, np.uint8)
                pixels[index % 4 : index % 4 + 4, 2:7] = colour
                path = tmp_path / f"pictures/{split}/{name}/{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    backbone = {"family": "dit", "depth": 1, "width": 32, "heads": 2, "patch": 4, "learn_sigma": False}
    values = {
        "model": {"backbone": backbone, "process": "linear", "sampling": {"steps": 2}},
        "data": {"source": {"name": "folder", "path": "pictures", "size": 8, "split": "train"}, "workers": 0},
        "train": {"images": 16, "batch": 8, "log_every": 8, "save_every": 8, "optimiser": "adamw:lr=1e-3"},
    }
    file = tmp_path / "squares.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_from_recipe_to_pictures_to_numbers(ditloom, recipe):
    ended = ditloom("train", recipe, "--set", "train.images=32", "--json")
    found = ended.document
    assert (found["images"], found["stopped"], found["run"]) == (32, False, "runs/squares")
    assert all(Path(found[name]).exists() for name in ("checkpoint", "model", "report"))
    assert yaml.safe_load(Path("runs/squares/recipe.yaml").read_text())["train"]["images"] == 32
    info = load(found["model"]).info
    assert (info["name"], info["images"], info["source"]["path"]) == ("squares", 32, "pictures")
    drawn = ditloom("generate", "--model", found["model"], "--classes", "all", "--out", "drawn", "--json").document
    assert drawn["settings"]["model"] == "squares" and drawn["total"] == 2
    arguments = ("evaluate", found["model"], "--extractor", "pixels:size=4", "--count", 10, "--out", "numbers")
    measured = ditloom(*arguments, "--metrics", "frechet,memorisation", "--json").document
    values = {m["protocol"]["metric"]: m for m in measured["measurements"]}
    assert values["frechet"]["value"] > 0 and values["frechet"]["protocol"]["samples"] == 10
    assert json.loads(Path("numbers/measurements.json").read_text()) == measured["measurements"]
    assert Path(measured["sheet"]).exists() and len(list(Path("numbers/pictures").glob("*.png"))) == 10
    shown = ditloom(*arguments, "--metrics", "frechet").out
    assert values["frechet"]["hash"] in shown and "euler, 2 steps, cfg:scale=3.0" in shown


def test_training_goes_on_where_it_stopped(ditloom, recipe):
    assert "16 images" in ditloom("train", recipe, "--out", "run").out
    again = ditloom("train", recipe, "--out", "run", "--set", "train.images=24")
    assert "resumed at 16 images" in again.err and "24 images" in again.out
    assert again.out.splitlines()[-1] == "ditloom generate --model run/model"


def test_what_was_trained_converts_with_or_without_averaging(ditloom, refused, recipe):
    ditloom("train", recipe, "--out", "run")
    ditloom("convert", "run", "averaged")
    ditloom("convert", "run", "raw", "--average", "none")
    first, second = (load(name).backbone.state_dict() for name in ("averaged", "raw"))
    assert first.keys() == second.keys() and any(not torch.equal(first[k], second[k]) for k in first)
    assert "unknown average 'rampd': did you mean 'ramped'" in refused("convert", "run", "x", "--average", "rampd")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--set", "train.imags=3"), "unknown setting in train 'imags': did you mean 'images'"),
        (("--set", "train.images=much"), "train.images must be a whole number; got 'much'"),
        (("--set", "train.precision=fp23"), "did you mean 'fp32'"),
        (("--set", "model.process=liner"), "unknown process 'liner': did you mean 'linear'"),
        (("--set", "model.backbone.family=dti"), "unknown backbone 'dti': did you mean 'dit'"),
        (("--set", "data.source.path=nowhere"), "nowhere does not exist"),
        (("--set", "train"), "--set takes part.key=value"),
        (("--set", "train.optimiser.lr=1"), "train.optimiser is 'adamw:lr=1e-3', which has no parts"),
        (("--set", "train.images=[1"), "is not a YAML value"),
        (("--device", "tpu"), "device 'tpu' cannot train"),
    ],
)
def test_mistakes_in_a_recipe(refused, recipe, arguments, sentence):
    assert sentence in refused("train", recipe, *arguments)


def test_recipes_that_are_none(refused, tmp_path):
    assert "could not read nowhere.yaml" in refused("train", "nowhere.yaml")
    (tmp_path / "torn.yaml").write_text("model: [")
    assert "torn.yaml is not valid YAML" in refused("train", "torn.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    assert "a recipe holds the parts" in refused("train", "list.yaml")
    assert "Missing from ditloom train: PATH" in refused("train")


def test_overrides_leave_the_original_alone():
    values = {"a": {"b": 1}, "c": "text"}
    changed = overridden(values, ["a.b=2", "a.new.deep=[1, x]", "c=null", "d=1e-3"])
    assert changed == {"a": {"b": 2, "new": {"deep": [1, "x"]}}, "c": None, "d": "1e-3"}
    assert values == {"a": {"b": 1}, "c": "text"}
    for change in ("=3", ".a=3", "a..b=3", "a.=1"):
        with pytest.raises(UserError, match="--set takes"):
            overridden(values, [change])
    with pytest.raises(UserError, match="a list|has no parts"):
        overridden([1], ["a=2"])


def test_estimates_of_training_and_of_drawing(ditloom, refused, recipe, model_folder):
    found = ditloom("estimate", recipe, "--probe", 2, "--json").document
    assert found["parameters"] > 1e4 and found["memory"] > found["weights"] > 0 and found["images"] == 16
    assert found["total_seconds"] > 0 and found["memory_free"] > 0
    assert ditloom("estimate", recipe, "--probe", 0, "--json").document["total_seconds"] is None
    small, large = (
        ditloom("estimate", "--model", model_folder, "--count", 10, "--batch-size", size, "--json").document
        for size in (2, 5)
    )
    assert small["evaluations"] == 5 * 3 and large["evaluations"] == 2 * 3 and small["macs"] == large["macs"]
    assert large["activations"] > small["activations"] and large["seconds"] > 0
    drawn = ditloom("generate", "--model", model_folder, "--count", 10, "--out", "run", "--json").document
    assert small["macs"] == drawn["report"]["macs"]
    unprobed = ditloom("estimate", "--model", model_folder, "--steps", 7, "--sampler", "heun", "--probe", 0)
    assert "13 forwards" in unprobed.out and "img/s" not in unprobed.out
    assert "takes either" in refused("estimate") and "takes either" in refused("estimate", recipe, "--model", "emoji")
    assert "--probe is at least 0" in refused("estimate", recipe, "--probe", "-1")


def test_estimated_weights_are_those_of_the_files(ditloom, model_folder):
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        found = ditloom("estimate", "--model", model_folder, "--probe", 0, "--dtype", dtype, "--json").document
        tensors = load(model_folder).backbone
        learned = sum(p.numel() for p in tensors.parameters())
        assert found["weights"] >= learned * size and found["weights"] < learned * size * 1.2


def test_there_and_back_in_a_foreign_format(ditloom, model_folder, tmp_path):
    out = ditloom("convert", model_folder, "dit.safetensors", "--to-format", "facebook-dit", "--json").document
    assert out["family"] == "dit" and out["format"] == "facebook-dit"
    spec = "dit:depth=2,width=32,heads=2,patch=4,image_size=16,channels=1,classes=3,learn_sigma=False"
    arguments = ("--backbone", spec, "--from-format", "facebook-dit", "--process", "linear")
    assert ditloom("convert", "dit.safetensors", "back", *arguments).code == 0
    original, back = load(model_folder), load("back")
    state = original.backbone.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in back.backbone.state_dict().items())
    pictures = [model.generate([1], steps=2, guidance=2.0).images[0] for model in (original, back)]
    assert (np.asarray(pictures[0]) == np.asarray(pictures[1])).all()
    assert back.process == original.process and back.info["name"] == "dit"
    loaded = load_foreign("dit.safetensors", original.backbone.preset, "facebook-dit")
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_a_model_folder_in_half_precision(ditloom, model_folder):
    ditloom("convert", model_folder, "half", "--dtype", "bf16")
    sizes = [(Path(folder) / "model.safetensors").stat().st_size for folder in (model_folder, "half")]
    assert sizes[1] < 0.6 * sizes[0]


def test_a_text_network_needs_its_encoder_named(refused, tmp_path):
    from ditloom.hub.checkpoint import save_foreign

    backbone = {"family": "u-vit", "depth": 2, "width": 32, "heads": 2, "patch": 2, "image_size": 4, "channels": 1}
    network = tiny(backbone={**backbone, "classes": 0, "text_width": 16}, conditioner={"name": "none"}).backbone
    save_foreign(network, "u-vit", tmp_path / "text.safetensors")
    spec = ",".join(f"{k}={v}" for k, v in {**backbone, "classes": 0, "text_width": 16}.items() if k != "family")
    said = refused("convert", "text.safetensors", "x", "--backbone", f"u-vit:{spec}")
    assert "name its encoder, such as --conditioner" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere", "x"), "there is no checkpoint at nowhere"),
        (("{model}", "x", "--to-format", "facebok-dit"), "did you mean 'facebook-dit'"),
        (("{model}", "x.safetensors", "--to-format", "u-vit"), "'u-vit'"),
        (("{model}", "x", "--dtype", "int4"), "unknown dtype 'int4'"),
        (("{model}", "file/x"), "cannot write the model to file/x"),
        (("{file}", "x"), "is not a whole safetensors file"),
        (("{file}", "x", "--backbone", "DiT-S/3"), "unknown backbone 'DiT-S/3': did you mean 'DiT-S/"),
        (("{file}", "x", "--backbone", "dit:dept=3"), "did you mean 'depth'"),
    ],
)
def test_conversions_that_cannot_be(refused, model_folder, tmp_path, arguments, sentence):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    names = {"model": model_folder, "file": "broken.safetensors"}
    assert sentence in refused("convert", *(argument.format(**names) for argument in arguments))


def test_evaluation_mistakes(refused, model_folder):
    evaluate = ("evaluate", model_folder)
    assert "unknown metric 'frechte': did you mean 'frechet'" in refused(*evaluate, "--metrics", "frechte")
    assert "unknown extractor 'pixel': did you mean 'pixels'" in refused(*evaluate, "--extractor", "pixel")
    assert "name it with --data SOURCE" in refused(*evaluate)
    assert "unknown sampler 'eulr'" in refused(*evaluate, "--sampler", "eulr")
    assert "--count must be at least 1" in refused(*evaluate, "--count", "0")
    assert "unknown data source 'emojj'" in refused(*evaluate, "--data", "emojj")
