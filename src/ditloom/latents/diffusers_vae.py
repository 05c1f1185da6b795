"""Autoencoders of the diffusers library as latent spaces, by local folder or hub name."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ditloom.conditions.borrowed import Borrowed
from ditloom.contracts.errors import MissingExtra, UnknownName, UserError
from ditloom.contracts.latent import LatentSpace
from ditloom.contracts.registry import register

ENCODERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "AutoencoderKL": lambda network, images: network.encode(images).latent_dist.mode(),
    "AutoencoderTiny": lambda network, images: network.encode(images).latents,
    "AutoencoderDC": lambda network, images: network.encode(images).latent,
}
"""How each class hands out its latents; a class that is not here is refused."""


@register("diffusers-vae", paper="Rombach et al. 2021, arXiv:2112.10752", extra="hub")
class DiffusersVAE(LatentSpace):
    """`AutoencoderKL`, `AutoencoderTiny` or `AutoencoderDC` (Chen et al. 2024): latents are (raw - shift) x scale.

    Shift and scale are what the network's configuration states, per channel where it does. `source` is a folder or a
    hub name, `subfolder` usually "vae" inside a pipeline. Weights stay where they are: a model folder keeps the name
    alone. Images in [-1, 1], which all three take.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, source: str, subfolder: str = "", revision: str | None = None):
        super().__init__()
        self.source, self.subfolder, self.revision = source, subfolder, revision
        stated = self._config()
        self.kind: str = stated.get("_class_name", "")
        if self.kind not in ENCODERS:
            raise UnknownName("diffusers autoencoder class", self.kind, ENCODERS)
        self.stated = {**self._defaults(), **stated}
        self.channels, self.factor = self.stated["latent_channels"], 2 ** _halvings(self.kind, self.stated)
        self.autoencoder = Borrowed(self._load)
        shift, scale = _normalisation(self.stated)
        self.register_buffer("shift", shift.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)

    def config(self) -> dict[str, Any]:
        return {"source": self.source, "subfolder": self.subfolder, "revision": self.revision}

    def encode(self, images: Tensor) -> Tensor:
        wanted = self.stated.get("in_channels", 3)
        if images.ndim != 4 or images.shape[1] != wanted:
            raise UserError(f"{self.source} takes images [B, {wanted}, H, W], got {list(images.shape)}")
        self.shape((images.shape[2], images.shape[3]))
        raw = ENCODERS[self.kind](self.autoencoder.network, images.to(self.shift.dtype))
        return (raw - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        raw = latents.to(self.shift.dtype) / self.scale + self.shift
        network: Any = self.autoencoder.network
        return network.decode(raw).sample.clamp(-1, 1)

    def _load(self) -> nn.Module:
        return self._explained(
            lambda diffusers: getattr(diffusers, self.kind).from_pretrained(
                self.source, subfolder=self.subfolder or None, revision=self.revision
            )
        )

    def _config(self) -> dict[str, Any]:
        return self._explained(
            lambda diffusers: diffusers.AutoencoderKL.load_config(
                self.source, subfolder=self.subfolder or None, revision=self.revision
            )
        )

    def _defaults(self) -> dict[str, Any]:
        """The class's own defaults: configurations written before a setting existed do not state it."""
        parameters = self._explained(lambda diffusers: signature(getattr(diffusers, self.kind).__init__)).parameters
        return {name: p.default for name, p in parameters.items() if p.default is not p.empty}

    def _explained(self, load: Callable[[Any], Any]) -> Any:
        try:
            import diffusers
        except ImportError as error:
            raise MissingExtra("diffusers", "hub", f"the autoencoder {self.source!r}") from error
        try:
            return load(diffusers)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the autoencoder {self.source!r}: {str(error).splitlines()[0]}") from error


def _normalisation(stated: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(shift, scale), one value or one per channel."""
    if stated.get("latents_mean") and stated.get("latents_std"):
        shift, scale = torch.tensor(stated["latents_mean"]), 1 / torch.tensor(stated["latents_std"])
    else:
        shift, scale = torch.tensor(stated.get("shift_factor") or 0), torch.tensor(stated.get("scaling_factor") or 1)
    return shift.float(), scale.float()


def _halvings(kind: str, stated: dict[str, Any]) -> int:
    """How often the encoder halves the size: between its levels."""
    levels = {"AutoencoderKL": "block_out_channels"}.get(kind, "encoder_block_out_channels")
    return len(stated[levels]) - 1
