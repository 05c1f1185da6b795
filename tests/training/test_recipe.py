"""A run from one YAML: model filled in from the data, stored latents, sample grids, the report."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ditloom.contracts.data import Example, SourceInfo
from ditloom.contracts.errors import UserError
from ditloom.contracts.registries import DATA
from ditloom.contracts.registry import register
from ditloom.training.config import TrainConfig
from ditloom.training.recipe import Recipe
from ditloom.training.report import write_report
from ditloom.training.samples import png, tiled


@register("squares")
class Squares:
    """Coloured squares: 12 pictures of 16 x 16 in three classes, with captions."""

    def __init__(self):
        self.info = SourceInfo("squares", 3, (16, 16), ("red", "green", "blue"), True, "none")
        self.opened = 0

    def __len__(self):
        return 12

    def __getitem__(self, index):
        self.opened += 1
        image = np.full((16, 16, 3), 255, dtype=np.uint8)
        image[index : index + 4, 2:9, :] = 40
        image[index : index + 4, 2:9, index % 3] = 250
        return Example(image, index % 3, f"a {self.info.classes[index % 3]} square", None, f"{index}.png")

    def texts(self, index):
        return (f"a {self.info.classes[index % 3]} square", "a square")

    def fingerprint(self):
        return "squares-1"


@pytest.fixture(autouse=True)
def squares(monkeypatch):
    monkeypatch.setitem(DATA._local, "squares", Squares.__registration__)
    monkeypatch.setattr("ditloom.training.recipe.registered", lambda registry, spec: Squares())


def values(**changes):
    recipe = {
        "model": {"backbone": {"family": "dit", "depth": 1, "width": 32, "heads": 2, "patch": 4}, "process": "linear"},
        "data": {"source": "squares", "workers": 0},
        "train": {"images": 32, "batch": 8, "log_every": 8, "save_every": 16, "optimiser": "adamw:lr=1e-3"},
    }
    for path, value in changes.items():
        part, key = path.split("__")
        recipe[part] = {**recipe.get(part, {}), key: value}
    return recipe


def test_the_model_is_filled_in_from_data_latents_and_process():
    recipe = Recipe.from_dict(values())
    model = recipe.build_model(Squares())
    preset = model.backbone.preset
    assert (preset.channels, preset.image_size, preset.classes, preset.learn_sigma) == (3, 16, 3, False)
    assert model.conditioner.names == ("red", "green", "blue")
    assert recipe.told(model) == "label"
    named = Recipe.from_dict(values(model__backbone={"preset": "dit-s/2", "depth": 1}, data__size=8))
    assert named.build_model(Squares()).backbone.preset.image_size == 8
    learned = values(model__process="discrete-vp:predicts='eps+var'")
    assert Recipe.from_dict(learned).build_model(Squares()).backbone.preset.learn_sigma


def test_a_run_may_start_from_the_weights_of_a_model(tmp_path):
    first = Recipe.from_dict(values(train__seed=7)).build_model(Squares())
    first.save(tmp_path / "first")
    second = Recipe.from_dict({**values(), "start": str(tmp_path / "first")})
    begun = second.build_model(Squares()).backbone
    assert all(torch.equal(a, b) for a, b in zip(begun.parameters(), first.backbone.parameters(), strict=True))
    assert all(p.requires_grad for p in begun.parameters())
    assert Recipe.from_dict(second.to_dict()) == second
    wider = {**values(model__backbone={"family": "dit", "depth": 1, "width": 64, "heads": 2, "patch": 4})}
    with pytest.raises(UserError, match=r"starting from .*first: .*wrong shape: blocks\.0"):
        Recipe.from_dict({**wider, "start": str(tmp_path / "first")}).build_model(Squares())
    with pytest.raises(UserError, match="did you mean|unknown model"):
        Recipe.from_dict({**values(), "start": "fashon"}).build_model(Squares())


def test_a_skip_dit_may_start_from_a_dit(tmp_path):
    shape = {"depth": 2, "width": 32, "heads": 2, "patch": 4}
    dit = Recipe.from_dict(values(model__backbone={"family": "dit", **shape})).build_model(Squares())
    dit.save(tmp_path / "dit")
    longer = values(model__backbone={"family": "skip-dit", "residual": True, **shape})
    skip = Recipe.from_dict({**longer, "start": str(tmp_path / "dit")}).build_model(Squares())
    x, t, condition = dit.backbone.example(2)
    with torch.no_grad():
        for model in (dit, skip):
            model.backbone.final_layer.linear.weight.fill_(0.1)
        assert torch.equal(dit.backbone(x, t, condition), skip.backbone(x, t, condition))


def test_weights_follow_from_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(3)
    a = Recipe.from_dict(values()).build_model(Squares()).backbone.t_embedder.mlp[0].weight
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    b = Recipe.from_dict(values()).build_model(Squares()).backbone.t_embedder.mlp[0].weight
    c = Recipe.from_dict(values(train__seed=1)).build_model(Squares()).backbone.t_embedder.mlp[0].weight
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model__backbone": "DiT-S/3"}, "did you mean 'DiT-S/"),
        ({"model__backbone": {"family": "dit", "depht": 3}}, "did you mean 'depth'"),
        ({"model__backbone": {"depth": 3}}, "needs a 'family' or a 'preset'"),
        ({"model__bacbone": {}}, "unknown setting in model 'bacbone': did you mean 'backbone'"),
        ({"data__sise": 3}, "unknown setting in data 'sise': did you mean 'size'"),
        ({"trian__images": 3}, "unknown setting in the recipe 'trian': did you mean 'train'"),
        ({"data__augment": {"flop": 1}}, "unknown setting in data.augment 'flop': did you mean 'flip'"),
    ],
)
def test_mistakes_name_the_nearest(changes, sentence, tmp_path):
    with pytest.raises(UserError, match=re.escape(sentence)):
        Recipe.from_dict(values(**changes)).trainer(tmp_path)


def test_a_recipe_without_its_parts_is_refused():
    with pytest.raises(UserError, match="no part 'model'"):
        Recipe.from_dict({"data": {"source": "squares"}})
    with pytest.raises(UserError, match="a recipe holds the parts"):
        Recipe.from_dict(None)


def test_it_trains_from_yaml_samples_reports_and_resumes(tmp_path):
    run = tmp_path / "run"
    recipe = Recipe.from_dict(
        values(train__sample_every=16, samples__inputs=["red", "blue"], samples__steps=2, samples__guidance=1.0)
    )
    recipe.save(run)
    assert Recipe.from_yaml(run / "recipe.yaml") == recipe
    trainer, model = recipe.trainer(run)
    outcome = trainer.train()
    assert outcome.images == 32 and model.backbone is trainer.learner.step.networks["student"]
    picture = Image.open(run / "samples" / "images-000000000032.png")
    assert picture.size == (2 * 18 + 2, 18 + 2) and picture.text == {"images": "32"}
    page = write_report(run, "squares", {"data": "<12 squares>"}).read_text()
    assert page.count("data:image/png;base64,") == 2 and page.count("<svg") == 2
    assert "&lt;12 squares&gt;" in page and "images seen" in page and "Recipe" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    again, _ = recipe.trainer(run)
    assert again.train().images == 32


def test_stored_latents_train_as_fresh_ones_without_opening_a_picture(tmp_path):
    fresh, _ = Recipe.from_dict(values()).trainer(tmp_path / "fresh")
    fresh.train()
    store = Recipe.from_dict(values(data__store=str(tmp_path / "store")))
    stored, _ = store.trainer(tmp_path / "stored")
    stored.train()
    a, b = fresh.learner.tensors()["model"], stored.learner.tensors()["model"]
    assert all(torch.equal(a[name], b[name]) for name in a)
    again, _ = store.trainer(tmp_path / "again")
    rows = next(again.feed.rows(0, 8))
    assert rows.x.shape == (8, 3, 16, 16) and rows.null.label.tolist() == [3]


def test_stored_latents_keep_mirror_images_and_refuse_other_changes(tmp_path):
    recipe = Recipe.from_dict(values(data__store=str(tmp_path), data__augment={"flip": 0.5}))
    trainer, _ = recipe.trainer(tmp_path / "run")
    rows = [row for part in trainer.feed.rows(0, 96) for row in part.x]
    mirrored = sum(bool(row[:, :, :7].mean() > row[:, :, 9:].mean()) for row in rows)
    assert 30 < mirrored < 66
    with pytest.raises(UserError, match="allow augment flip=0 or flip=0.5 only"):
        Recipe.from_dict(values(data__store=str(tmp_path), data__augment={"shift": 0.1})).trainer(tmp_path / "x")


def test_a_grid_is_nearly_square_and_its_png_keeps_notes():
    pictures = [Image.new("RGB", (8, 6), colour) for colour in ("red", "green", "blue", "black", "white")]
    page = tiled(pictures)
    assert page.size == (3 * 10 + 2, 2 * 8 + 2)
    assert page.getpixel((3, 3)) == (255, 0, 0) and page.getpixel((13, 11)) == (255, 255, 255)
    assert Image.open(io.BytesIO(png(page, {"a": "b"}))).text == {"a": "b"}


def test_defaults_are_a_valid_recipe():
    assert TrainConfig().total == 100_000
    assert Path(Recipe.from_dict(values()).to_dict()["data"]["source"]) == Path("squares")
