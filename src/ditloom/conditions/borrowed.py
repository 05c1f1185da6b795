"""A frozen network of somebody else's: named in the configuration, not saved with the model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Borrowed(nn.Module):
    """Holds a frozen network that is loaded on first use and moves with its owner.

    It contributes no parameter and no state-dict entry: optimisers, checkpoints and sharding do not see it, and the
    model folder keeps the name it was loaded by. `load` returns the network.
    """

    place: Tensor

    def __init__(self, load: Callable[[], nn.Module]):
        super().__init__()
        self._load = load
        self._held: list[nn.Module] = []
        self.register_buffer("place", torch.empty(0), persistent=False)

    @property
    def network(self) -> nn.Module:
        """The network in eval mode, at its owner's device and dtype."""
        if not self._held:
            device = "cpu" if self.place.is_meta else self.place.device
            network = self._load().eval().requires_grad_(False)
            self._held.append(network.to(device=device, dtype=self.place.dtype))
        return self._held[0]

    def fingerprint(self) -> str:
        """A hash of the network's parameter names, shapes and a sample of values: equal weights, equal fingerprint."""
        return fingerprint_of(self.network.state_dict())

    def __deepcopy__(self, memo: dict[int, Any]) -> Borrowed:
        """A copy of the owner loads its own network when it needs one."""
        copy = Borrowed(self._load)
        copy.place = self.place.clone()
        return copy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Borrowed:
        super()._apply(fn, recurse)
        for network in self._held:
            network._apply(fn, recurse)
        return self


def fingerprint_of(tensors: dict[str, Tensor], sampled: int = 256) -> str:
    """Hash of names, shapes and up to `sampled` evenly spaced values of each tensor, in float32."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().reshape(-1)
        values = values[:: max(1, values.numel() // sampled)].float().cpu()
        digest.update(f"{name}{list(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()
