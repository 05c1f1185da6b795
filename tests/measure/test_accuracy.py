"""Accuracy: counting on a made-up classifier, and the shipped one on real test pictures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from painter import real

from ditloom.contracts.errors import UserError
from ditloom.data.fashion_mnist import CLASSES, SYSTEM, FashionMnist
from ditloom.measure.accuracy import Accuracy
from ditloom.measure.evidence import Case, Evidence, Real
from ditloom.measure.extractors.fashion_cnn import WEIGHTS, FashionCnn
from ditloom.measure.extractors.pixels import Pixels
from ditloom.measure.features import Classifier, extract


class Reader(Classifier):
    """Reads the class off the first pixel."""

    tag, classes, dimension = "reader", CLASSES, 10

    def forward(self, images):
        return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 10).float()

    def logits(self, features):
        return features


def written(values: list[int], labels: list[int]) -> Real:
    images = np.zeros((len(values), 4, 4, 1), dtype=np.uint8)
    images[:, 0, 0, 0] = values
    return Real(images, tuple(Case(label, str(i), None, label) for i, label in enumerate(labels)))


def test_it_counts_over_all_and_by_class_with_binomial_errors():
    drawn, held_out = written([1, 1, 2, 3], [1, 1, 2, 2]), written([0, 1, 5, 5], [0, 1, 5, 6])
    found = Accuracy()(Evidence(drawn.images, drawn.cases, held_out, held_out, Reader()))
    values = {reading.name: reading for reading in found}
    assert values["accuracy"].value == 0.75
    assert values["accuracy"].error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert values["accuracy"].facts == {"held_out": 4, "held_out_accuracy": 0.75}
    assert values["accuracy/trouser"].value == 1
    assert values["accuracy/pullover"].value == 0.5


def test_an_extractor_that_does_not_classify_and_cases_without_labels_are_refused():
    pictures = real(range(1))
    with pytest.raises(UserError, match="pixels-8"):
        Accuracy()(Evidence(pictures.images, pictures.cases, pictures, pictures, Pixels(8)))
    bare = tuple(replace(case, label=None) for case in pictures.cases)
    with pytest.raises(UserError, match="a class label"):
        Accuracy()(Evidence(pictures.images, bare, pictures, pictures, Reader()))


@pytest.mark.skipif(not SYSTEM.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_the_shipped_classifier_reads_a_thousand_real_test_pictures():
    source = FashionMnist(split="test")
    net = FashionCnn()
    with torch.no_grad():
        logits = net.logits(extract(net, source.images[:1000, :, :, None]))
    right = (logits.argmax(1).numpy() == source.labels[:1000]).mean()
    assert right >= 0.92


def test_the_shipped_classifier_is_small_and_says_how_it_was_made():
    from safetensors import safe_open

    assert WEIGHTS.stat().st_size < 1_000_000
    assert sum(p.numel() for p in FashionCnn().parameters()) < 400_000
    with safe_open(WEIGHTS, "pt") as file:
        facts = file.metadata()
    assert float(facts["test_accuracy"]) >= 0.92
    assert int(facts["epochs"]) > 0


def test_the_classifier_cuts_the_frame_and_takes_the_mean_of_the_channels():
    inner = torch.randint(256, (2, 1, 28, 28), dtype=torch.uint8)
    net = FashionCnn()
    framed = torch.nn.functional.pad(inner, (2, 2, 2, 2)).expand(-1, 3, -1, -1)
    assert torch.allclose(net(framed), net(inner), atol=1e-5)
    with pytest.raises(UserError, match="28x28 or more"):
        net(inner[..., :20])
