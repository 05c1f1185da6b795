"""Pictures to feature vectors, in chunks that never depend on how the pictures were drawn."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.settings import parse
from ditloom.measure import EXTRACTORS
from ditloom.training.durable import explained, replace_file, tensor_chunks

CHUNK = 32
"""Pictures per forward. Fixed, because a convolution's last bits depend on the batch size."""


class Extractor(nn.Module, ABC):
    """A frozen network from pictures to vectors.

    `tag` names the extractor, its weights and its resizing: it enters every protocol, and features of unlike tags are
    never compared.
    """

    tag: str
    dimension: int

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 1 or 3, H, W] to float32 [B, dimension]."""


class Classifier(Extractor):
    """An extractor whose features also feed a classification layer."""

    classes: ClassVar[tuple[str, ...]]

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """[B, dimension] to [B, len(classes)]."""


def built(spec: str | Extractor) -> Extractor:
    """An extractor by its registered name, with settings where it has any: "pixels:size=16"."""
    if isinstance(spec, Extractor):
        return spec
    name, settings = parse(spec)
    target = EXTRACTORS.get(name)
    known = inspect.signature(target).parameters
    for key in settings.keys() - known:
        raise UnknownName(f"extractor {name} setting", key, known)
    return target(**settings)


def as_rgb(images: Tensor) -> Tensor:
    """uint8 [B, 1 or 3, H, W] to float32 [B, 3, H, W] in [0, 255]."""
    return images.float().expand(-1, 3, -1, -1)


@torch.no_grad()
def extract(extractor: Extractor, images: NDArray[np.uint8]) -> Tensor:
    """Features [N, dimension] of pictures [N, H, W, C], `CHUNK` at a time in order."""
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8:
        raise UserError(f"expected uint8 pictures [N, H, W, 1 or 3], got {images.dtype} {list(images.shape)}")
    starts = range(0, len(images), CHUNK)
    chunks = (torch.from_numpy(images[start : start + CHUNK].transpose(0, 3, 1, 2).copy()) for start in starts)
    found = [extractor(chunk).float() for chunk in chunks]
    return torch.cat(found) if found else torch.empty(0, extractor.dimension)


def extract_cached(extractor: Extractor, images: NDArray[np.uint8], folder: Path | None) -> Tensor:
    """`extract`, kept in `folder` under a hash of the pictures and the extractor's tag; None keeps nothing."""
    if folder is None:
        return extract(extractor, images)
    digest = hashlib.blake2b(f"{extractor.tag} {images.shape}".encode(), digest_size=16)
    digest.update(images.tobytes())
    path = folder / f"features-{digest.hexdigest()}.safetensors"
    try:
        return load_file(path)["features"]
    except (OSError, SafetensorError):
        features = extract(extractor, images)
        with explained("write to", folder):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, tensor_chunks({"features": features}))
        return features
