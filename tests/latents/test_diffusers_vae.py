"""diffusers' autoencoders through tiny random configurations, against the library's own encode and decode."""

from __future__ import annotations

import json

import pytest
import torch

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.registries import LATENTS
from ditloom.latents.cache import space_fingerprint
from ditloom.latents.diffusers_vae import DiffusersVAE

diffusers = pytest.importorskip("diffusers")
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
KL = {**BLOCKS, "block_out_channels": (8, 8, 16), "norm_num_groups": 4, "latent_channels": 4}
TINY = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "latent_channels": 4}
DC_LEVELS = {"encoder_block_out_channels": (16, 16, 32), "decoder_block_out_channels": (16, 16, 32)}
DC_DEPTHS = {"encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1)}
DC_ATTENTION = {"encoder_qkv_multiscales": ((), (), ()), "decoder_qkv_multiscales": ((), (), ())}
DC = {**DC_LEVELS, **DC_DEPTHS, **DC_ATTENTION, "latent_channels": 8, "attention_head_dim": 8}
MAKE = {
    "kl": lambda: diffusers.AutoencoderKL(**KL, scaling_factor=0.7, shift_factor=0.3),
    "kl-unshifted": lambda: diffusers.AutoencoderKL(**KL),
    "kl-per-channel": lambda: diffusers.AutoencoderKL(
        **KL, latents_mean=(0.1, 0.2, 0.3, 0.4), latents_std=(1.5, 2.0, 0.5, 1.0)
    ),
    "tiny": lambda: diffusers.AutoencoderTiny(**TINY),
    "dc": lambda: diffusers.AutoencoderDC(**DC, scaling_factor=0.41407),
}
FACTORS = {"kl": 4, "kl-unshifted": 4, "kl-per-channel": 4, "tiny": 8, "dc": 4}
# (raw - shift) x scale, written out from each class's published convention
NORMALISE = {
    "kl": lambda raw: (raw - 0.3) * 0.7,
    "kl-unshifted": lambda raw: raw * 0.18215,
    "kl-per-channel": lambda raw: (raw - _channels(0.1, 0.2, 0.3, 0.4)) / _channels(1.5, 2.0, 0.5, 1.0),
    "tiny": lambda raw: raw,
    "dc": lambda raw: raw * 0.41407,
}


def _channels(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


@pytest.fixture(scope="module", params=list(MAKE))
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    network = MAKE[request.param]().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    folder = tmp_path_factory.mktemp("vae")
    network.save_pretrained(folder / "vae")
    return request.param, network, folder


@torch.no_grad()
def test_encode_and_decode_equal_the_library(saved):
    name, network, folder = saved
    space = DiffusersVAE(str(folder), subfolder="vae")
    images = torch.rand(3, 3, 40, 24) * 2 - 1
    output = network.encode(images)
    raw = output.latent_dist.mode() if "kl" in name else output[0]
    latents = space.encode(images)
    assert latents.shape[1:] == space.shape((40, 24)) == (space.channels, 40 // FACTORS[name], 24 // FACTORS[name])
    torch.testing.assert_close(latents, NORMALISE[name](raw), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(space.decode(latents), network.decode(raw).sample.clamp(-1, 1), atol=1e-5, rtol=1e-4)


def test_only_the_name_is_kept(saved):
    _, _, folder = saved
    space = DiffusersVAE(str(folder), subfolder="vae")
    assert not space.state_dict() and not list(space.parameters())
    again = LATENTS.get("diffusers-vae")(**json.loads(json.dumps(space.config())))
    again.load_state_dict(space.state_dict())
    assert space_fingerprint(again) == space_fingerprint(space)


def test_gradients_pass_through_the_frozen_decoder(saved):
    _, _, folder = saved
    space = DiffusersVAE(str(folder), subfolder="vae")
    latents = torch.zeros(1, *space.shape(16)).requires_grad_()
    space.decode(latents).sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0


def test_an_old_configuration_takes_the_class_defaults(tmp_path):
    MAKE["kl-unshifted"]().save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    for name in ("scaling_factor", "shift_factor"):
        del stated[name]
    (tmp_path / "config.json").write_text(json.dumps(stated))
    space = DiffusersVAE(str(tmp_path))
    assert space.scale.flatten().tolist() == [pytest.approx(0.18215)] and not space.shift.any()


def test_bad_requests_are_one_sentence(saved, tmp_path):
    _, _, folder = saved
    space = DiffusersVAE(str(folder), subfolder="vae")
    with pytest.raises(UserError, match="not a multiple"):
        space.encode(torch.zeros(1, 3, 41, 24))
    with pytest.raises(UserError, match=r"\[B, 3, H, W\]"):
        space.encode(torch.zeros(1, 4, 40, 24))
    with pytest.raises(UserError, match="cannot load the autoencoder"):
        DiffusersVAE(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLWan", "latent_channels": 4}')
    with pytest.raises(UnknownName, match="'AutoencoderKL'"):
        DiffusersVAE(str(tmp_path))
