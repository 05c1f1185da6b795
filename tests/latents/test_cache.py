"""Pixels, latent statistics, and latents of a source kept on disk."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from ditloom.contracts.data import Example, SourceInfo
from ditloom.contracts.errors import UserError
from ditloom.contracts.registries import LATENTS
from ditloom.latents.autoencoder import Autoencoder
from ditloom.latents.cache import LatentCache, as_images, encode_source
from ditloom.latents.pixels import Pixels
from ditloom.latents.statistics import RunningMoments, measure


class Noise:
    """Random pictures; counts how often each was read."""

    def __init__(self, count: int = 11, size: int = 8, seed: int = 0, odd: int | None = None):
        self.info = SourceInfo("noise", 3, (size, size), None, False, "none")
        self.count, self.size, self.seed, self.odd, self.reads = count, size, seed, odd, []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        self.reads.append(index)
        size = self.size + 8 if index == self.odd else self.size
        image = np.random.default_rng([self.seed, index]).integers(0, 256, (size, size, 3), dtype=np.uint8)
        return Example(image, None, None, None, f"noise-{index}")

    def fingerprint(self) -> str:
        return f"noise {self.count} {self.size} {self.seed}"


class Stopped(Exception):
    pass


def stop_after(images: int):
    def progress(done: int, count: int) -> None:
        if done >= images:
            raise Stopped

    return progress


@pytest.fixture(scope="module")
def space() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(latent_channels=4, widths=(6, 6), encoder_depths=(1, 1), decoder_depths=(1, 1)).eval()


def direct(source: Noise, space: Autoencoder) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([space.encode(as_images([source[i].image])) for i in range(len(source))])


def test_pixels_are_the_identity():
    pixels = LATENTS.get("pixels")(**Pixels(1).config())
    images = torch.rand(2, 1, 5, 7) * 2 - 1
    assert torch.equal(pixels.decode(pixels.encode(images)), images)
    assert pixels.shape((5, 7)) == (1, 5, 7) and pixels.decode(images * 9).abs().max() == 1
    with pytest.raises(UserError, match=r"\[B, 1, H, W\]"):
        pixels.encode(torch.zeros(1, 3, 4, 4))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.floats(-1e3, 1e3), st.integers(0, 99))
def test_running_moments_equal_those_of_all_data_at_once(sizes, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(n, 3, 2, 4, generator=generator, dtype=torch.float64) + offset for n in sizes]
    moments = RunningMoments(3)
    for batch in batches:
        moments.add(batch)
    rows = torch.cat(batches).transpose(0, 1).flatten(1).numpy()
    result = moments.result()
    np.testing.assert_allclose(result.mean, rows.mean(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(result.std, rows.std(1), rtol=1e-6)
    assert result.count == sum(sizes)


def test_statistics_set_on_an_autoencoder_whiten_its_channels(space):
    made = Autoencoder(**space.config())
    made.load_state_dict(space.state_dict())
    images = as_images([Noise()[i].image for i in range(11)])
    found = measure(made, images.split(4))
    made.latent_mean.copy_(found.mean)
    made.latent_std.copy_(found.std)
    again = measure(made, [images])
    torch.testing.assert_close(again.mean, torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(again.std, torch.ones(4), atol=1e-5, rtol=0)


def test_statistics_of_nothing_are_refused(space):
    with pytest.raises(UserError, match="at least one image"):
        measure(space, [])


def test_cached_latents_equal_direct_ones_for_any_batch(space, tmp_path):
    source = Noise()
    expected = direct(source, space)
    for batch in (1, 4, 64):
        cache = encode_source(source, space, tmp_path / str(batch), batch=batch)
        assert len(cache) == 11
        torch.testing.assert_close(cache.rows(range(11)), expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(cache[3], expected[3], atol=1e-6, rtol=1e-5)


def test_the_file_is_plain_safetensors(space, tmp_path):
    encode_source(Noise(), space, tmp_path, dtype="float16")
    with safe_open(tmp_path / "latents.safetensors", "pt") as file:
        stored = file.get_tensor("latents")
    assert stored.shape == (11, 4, 2, 2) and stored.dtype == torch.float16
    torch.testing.assert_close(stored.float(), direct(Noise(), space), atol=2e-3, rtol=2e-3)


def test_finished_cache_is_opened_without_encoding(space, tmp_path):
    encode_source(Noise(), space, tmp_path)
    again = Noise()
    assert torch.equal(encode_source(again, space, tmp_path).rows([0]), LatentCache(tmp_path).rows([0]))
    assert again.reads == []


def test_interrupted_cache_continues_and_equals_an_uninterrupted_one(space, tmp_path, monkeypatch):
    monkeypatch.setattr("ditloom.latents.cache.PROGRESS_EVERY", 2)
    with pytest.raises(Stopped):
        encode_source(Noise(), space, tmp_path / "a", batch=2, progress=stop_after(6))
    with pytest.raises(UserError, match="no finished latents"):
        LatentCache(tmp_path / "a")
    rest = Noise()
    resumed = encode_source(rest, space, tmp_path / "a", batch=2)
    assert min(i for i in rest.reads if i) == 4
    whole = encode_source(Noise(), space, tmp_path / "b", batch=2)
    assert torch.equal(resumed.rows(range(11)), whole.rows(range(11)))


def test_other_data_weights_or_precision_are_refused_not_overwritten(space, tmp_path):
    encode_source(Noise(), space, tmp_path)
    before = (tmp_path / "latents.safetensors").read_bytes()
    other = Autoencoder(**space.config())
    changed = [(Noise(seed=1), space, "float32"), (Noise(), other, "float32"), (Noise(), space, "float16")]
    for source, encoder, dtype in changed:
        with pytest.raises(UserError, match="other data or of another latent space"):
            encode_source(source, encoder, tmp_path, dtype=dtype)
    assert (tmp_path / "latents.safetensors").read_bytes() == before


def test_image_of_another_size_is_named(space, tmp_path):
    with pytest.raises(UserError, match="'noise-5' is"):
        encode_source(Noise(odd=5), space, tmp_path)


def test_faults_on_disk_are_one_sentence(space, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="empty"):
        encode_source(Noise(count=0), space, tmp_path)
    with pytest.raises(UserError, match="float32 or float16"):
        encode_source(Noise(), space, tmp_path, dtype="int8")
    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="No space left on device"):
            encode_source(Noise(), space, tmp_path)
    assert list(tmp_path.iterdir()) == []
    encode_source(Noise(), space, tmp_path)
    (tmp_path / "latents.safetensors").write_bytes(b"\0" * 600)
    with pytest.raises(UserError, match="does not hold what its manifest says"):
        LatentCache(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"count": 1}))
    with pytest.raises(UserError, match="not a manifest"):
        LatentCache(tmp_path)
