"""diffusers' module of exactly a configuration of ours, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ditloom.backbones.hunyuan_dit import rotary_of_grid
from ditloom.contracts.backbone import Backbone
from ditloom.contracts.condition import Condition
from ditloom.hub.checkpoint import foreign_state_dict
from ditloom.hub.formats import FORMATS
from ditloom.parts.patches import patchify
from ditloom.parts.positions import grid_positions, with_axes

Arguments = dict[str, Any]
IN_BF16 = ("hidden_states", "pooled", "timestep")


@dataclass(frozen=True)
class Peer:
    """A hub format, whose settings make diffusers' module, and the arguments of that module's forward."""

    format: str
    arguments: Callable[[Any, Tensor, Tensor, Condition], Arguments]

    def build(self, net: Backbone) -> nn.Module:
        """diffusers' module with the weights of a network of ours."""
        settings, diffusers = FORMATS.get(self.format)().settings(net.preset), import_module("diffusers")
        diffusers.logging.set_verbosity_error()
        theirs = getattr(diffusers, settings.pop("_class_name"))(**settings)
        theirs.load_state_dict(foreign_state_dict(net, self.format))
        return theirs


def peer_of(family: str) -> Peer | None:
    """The peer of a family, if diffusers is installed and has that architecture."""
    return PEERS.get(family) if find_spec("diffusers") else None


def in_bf16(arguments: Arguments) -> Arguments:
    """The same arguments with the latent, texts and times in bf16; positions stay as they are."""
    named = {k: v for k, v in arguments.items() if any(part in k for part in IN_BF16)}
    return {**arguments, **{k: v.bfloat16() for k, v in named.items() if v.is_floating_point()}}


def labelled(config: Any, x: Tensor, t: Tensor, condition: Condition) -> Arguments:
    """DiT."""
    return {"hidden_states": x, "timestep": (t * 999).long(), "class_labels": condition.label}


def reading(config: Any, x: Tensor, t: Tensor, condition: Condition) -> Arguments:
    """Latte, SANA and Wan: latent, time and text."""
    return {"hidden_states": x, "timestep": (1000 * t).float(), "encoder_hidden_states": condition.text}


def pooled(config: Any, x: Tensor, t: Tensor, condition: Condition) -> Arguments:
    """Stable Diffusion 3."""
    return {**reading(config, x, t, condition), "pooled_projections": condition.pooled}


def told_no_size(config: Any, x: Tensor, t: Tensor, condition: Condition) -> Arguments:
    """PixArt-Sigma."""
    return {**reading(config, x, t, condition), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def packed(config: Any, x: Tensor, t: Tensor, condition: Condition) -> Arguments:
    """FLUX: tokens that are cut from the latent outside."""
    grid = (x.shape[-2] // config.patch, x.shape[-1] // config.patch)
    return {
        **pooled(config, patchify(x, config.patch), t, condition),
        "timestep": t.float(),
        "img_ids": with_axes(grid_positions(*grid), 3).float(),
        "txt_ids": torch.zeros(config.text_tokens, 3),
    }


def two_texts(config: Any, x: Tensor, t: Tensor, condition: Condition) -> Arguments:
    """Hunyuan-DiT: no token of either text is padding."""
    grid = (x.shape[-2] // config.patch, x.shape[-1] // config.patch)
    return {
        **reading(config, x, t, condition),
        "text_embedding_mask": torch.ones(len(x), config.text_tokens, dtype=torch.bool),
        "encoder_hidden_states_t5": condition.extra["t5"],
        "text_embedding_mask_t5": torch.ones(len(x), config.t5_tokens, dtype=torch.bool),
        "image_meta_size": None,
        "style": torch.zeros(len(x), dtype=torch.int64),
        "image_rotary_emb": rotary_of_grid(*grid, config.base, config.width // config.heads, x.device),
    }


def every_layer(config: Any, x: Tensor, t: Tensor, condition: Condition) -> Arguments:
    """HiDream: the states of every layer of the language model."""
    return {
        "hidden_states": x,
        "timesteps": (1000 * t).float(),
        "encoder_hidden_states_t5": condition.text,
        "encoder_hidden_states_llama3": condition.extra["llama"].transpose(0, 1),
        "pooled_embeds": condition.pooled,
    }


PEERS: dict[str, Peer] = {
    "dit": Peer("diffusers-dit", labelled),
    "flux": Peer("diffusers-flux", packed),
    "hidream": Peer("hidream", every_layer),
    "hunyuan-dit": Peer("diffusers-hunyuan-dit", two_texts),
    "latte": Peer("diffusers-latte", reading),
    "mmdit": Peer("diffusers-sd3", pooled),
    "pixart-sigma": Peer("diffusers-pixart", told_no_size),
    "sana": Peer("diffusers-sana", reading),
    "wan": Peer("diffusers-wan", reading),
}
