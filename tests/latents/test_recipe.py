"""The autoencoder's recipe on a tiny network and random pictures: it learns, and a killed run resumes bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ditloom.latents.autoencoder import Autoencoder, AutoencoderConfig
from recipes import autoencoder as recipe

TINY = AutoencoderConfig(latent_channels=4, widths=(8, 12), encoder_depths=(1, 0), decoder_depths=(1, 0))


class Killed(Exception):
    pass


@pytest.fixture
def settings(monkeypatch, tmp_path):
    smooth = np.random.default_rng(0).integers(0, 256, (26, 3, 3, 3), dtype=np.uint8)
    images = smooth.repeat(8, axis=1).repeat(8, axis=2)
    pictures = recipe.Pictures(images[:20], np.repeat(np.arange(20), 2), images[20:])
    monkeypatch.setattr(recipe, "load_pictures", lambda: pictures)

    def made(name: str) -> recipe.Recipe:
        shape = {"model": TINY, "size": 16, "images": 192, "batch": 8, "warmup_images": 16, "learning_rate": 0.05}
        return recipe.Recipe(tmp_path / name, perceptual=0, evaluate_every=64, ema=0.8, **shape)

    return made


def test_it_learns_and_leaves_weights_statistics_and_sheet(settings):
    run = settings("whole")
    recipe.train(run)
    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    curve = [row["held_out_psnr"] for row in rows if "held_out_psnr" in row]
    assert len(curve) == 3 and curve[-1] > curve[0] + 1
    made = Autoencoder(run.out / "autoencoder.safetensors")
    assert (made.latent_std > 0).all() and not torch.equal(made.latent_std, torch.ones(4))
    assert (run.out / "reconstructions.png").stat().st_size > 100


def test_killed_and_resumed_gives_the_same_file(settings, monkeypatch):
    recipe.train(settings("whole"))
    run, update = settings("killed"), recipe.Trainer.update

    def until_step_11(self, terms):
        if self.step == 11:
            raise Killed
        return update(self, terms)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(recipe.Trainer, "update", until_step_11)
        recipe.train(run)
    assert recipe.Trainer(run).step == 8
    recipe.train(run)
    files = [settings(name).out / "autoencoder.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_orthogonal_update_has_singular_values_near_one():
    optimiser = recipe.Muon([torch.nn.Parameter(torch.zeros(2, 2))])
    for shape in ((8, 40), (40, 8), (16, 16)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(optimiser.orthogonal(matrix).float())
        assert values.min() > 0.3 and values.max() < 1.4


def test_every_epoch_sees_each_picture_once_and_resumes_in_order():
    stream = recipe.batches(12, 4, 0, 0)
    steps = [next(stream) for _ in range(6)]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(torch.cat([places for _, places in epoch]).tolist()) == list(range(12))
    resumed = recipe.batches(12, 4, 0, 4)
    for wanted in steps[4:]:
        step, places = next(resumed)
        assert step == wanted[0] and torch.equal(places, wanted[1])
