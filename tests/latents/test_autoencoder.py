"""The convolutional autoencoder: sizes, locality, its file, and what the bundled one reaches."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.registries import LATENTS
from ditloom.latents.autoencoder import Autoencoder, AutoencoderConfig, bundled, kl_to_standard_normal

TINY = {"latent_channels": 5, "widths": (8, 12), "encoder_depths": (1, 0), "decoder_depths": (1, 1)}


def tiny(seed: int = 0, **changes) -> Autoencoder:
    """Every weight and statistic random, zero-initialised ones included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Autoencoder(**{**TINY, **changes}).eval()
        for tensor in made.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) * 0.2)
        made.latent_std.abs_().add_(0.5)
    return made


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@torch.no_grad()
def test_any_multiple_of_the_factor(rows, columns, batch):
    space = tiny()
    images = torch.rand(batch, 3, 4 * rows, 4 * columns) * 2 - 1
    latents = space.encode(images)
    assert latents.shape == (batch, *space.shape((4 * rows, 4 * columns))) == (batch, 5, rows, columns)
    assert space.decode(latents).shape == images.shape


@torch.no_grad()
def test_a_change_in_one_corner_stays_there():
    space = tiny()
    images = torch.zeros(1, 3, 128, 128)
    changed = images.clone()
    changed[..., :4, :4] = 1
    moved = (space.encode(changed) - space.encode(images)).abs().amax(dim=(0, 1))
    assert moved[:4, :4].max() > 0 and not moved[8:].any() and not moved[:, 8:].any()


@torch.no_grad()
def test_interior_does_not_depend_on_the_image_size():
    space = tiny()
    large = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    cut = space.encode(large[..., 32:96, 32:96])
    torch.testing.assert_close(cut[..., 6:10, 6:10], space.encode(large)[..., 14:18, 14:18], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_statistics_normalise_and_are_undone():
    space, plain = tiny(), tiny()
    plain.latent_mean.zero_()
    plain.latent_std.fill_(1)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    raw = plain.encode(images)
    wanted = (raw - space.latent_mean.view(1, -1, 1, 1)) / space.latent_std.view(1, -1, 1, 1)
    torch.testing.assert_close(space.encode(images), wanted)
    torch.testing.assert_close(space.decode(space.encode(images)), plain.decode(raw), atol=1e-5, rtol=1e-5)


def test_residual_branches_start_silent_and_the_encoder_starts_as_averages():
    fresh = AutoencoderConfig(**TINY).build()
    assert all(not m.second.weight.any() for m in fresh.modules() if hasattr(m, "second"))
    assert fresh.config() == {**AutoencoderConfig(**TINY).build().config()}


def test_kl_against_torch_distributions():
    mean, log_variance = torch.randn(3, 4), torch.randn(3, 4)
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    oracle = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_to_standard_normal(mean, log_variance), oracle)


@torch.no_grad()
def test_rebuilt_from_config_and_state(tmp_path):
    space = tiny()
    again = LATENTS.get("autoencoder")(**json.loads(json.dumps(space.config())))
    again.load_state_dict(space.state_dict())
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(again.encode(images), space.encode(images))


@torch.no_grad()
def test_saved_file_carries_its_settings(tmp_path):
    space, path = tiny(), tmp_path / "folder" / "mine.safetensors"
    space.save(path, torch.float32)
    again = Autoencoder(path)
    assert again.config() == space.config() and [p.name for p in path.parent.iterdir()] == [path.name]
    latents = torch.randn(1, 5, 2, 2)
    assert torch.equal(again.decode(latents), space.decode(latents))


def test_bad_requests_are_one_sentence(tmp_path):
    space = tiny()
    with pytest.raises(UserError, match=r"\[B, 3, H, W\], got \[1, 1, 8, 8\]"):
        space.encode(torch.zeros(1, 1, 8, 8))
    with pytest.raises(UserError, match="10x8 is not a multiple"):
        space.encode(torch.zeros(1, 3, 10, 8))
    with pytest.raises(UnknownName, match="'widths'"):
        Autoencoder(width=(1,))
    with pytest.raises(UserError, match="one width and two depths"):
        Autoencoder(widths=(8,))
    with pytest.raises(UserError, match="no autoencoder file"):
        Autoencoder(tmp_path / "absent.safetensors")
    with pytest.raises(UnknownName, match="bundled autoencoder"):
        Autoencoder("emojy")


def test_foreign_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not an autoencoder"):
        Autoencoder(path)
    tiny().save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="not an autoencoder"):
        Autoencoder(path)
    tiny().save(path)
    with pytest.raises(UserError, match="latent_channels = 5, and 4"):
        Autoencoder(path, latent_channels=4)


class TestBundled:
    """The autoencoder in the package, on emoji it was not trained on."""

    @pytest.fixture(scope="class")
    def emoji(self):
        return Autoencoder("emoji").eval().requires_grad_(False)

    @pytest.fixture(scope="class")
    def held_out(self):
        from ditloom.data.emoji import Emoji
        from ditloom.latents.cache import as_images

        source = Emoji("held-out")
        return as_images([source[index].image for index in range(0, len(source), 4)])

    def test_it_is_small(self, emoji):
        assert "emoji" in bundled() and emoji.shape(64) == (16, 8, 8)
        assert sum(p.numel() for p in emoji.parameters()) <= 2_500_000
        assert all(t.dtype == torch.float16 for t in load_file(_bundled_path("emoji")).values())

    def test_held_out_reconstruction_is_above_30_db(self, emoji, held_out):
        decoded = emoji.decode(emoji.encode(held_out))
        error = ((decoded - held_out) * 127.5).round().square().mean(dim=(1, 2, 3))
        assert float((10 * torch.log10(255**2 / error)).mean()) > 30

    def test_latents_are_normalised(self, emoji, held_out):
        latents = emoji.encode(held_out)
        assert latents.mean().abs() < 0.1 and 0.9 < latents.std() < 1.1
        per_channel = latents.transpose(0, 1).flatten(1).std(1)
        assert per_channel.min() > 0.7 and per_channel.max() < 1.4


def _bundled_path(name):
    from ditloom.latents.autoencoder import BUNDLED

    return str(BUNDLED / f"{name}.safetensors")
