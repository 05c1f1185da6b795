"""From a data source to what the network sees: latents and conditions, by global image index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ditloom.contracts import rng
from ditloom.contracts.condition import Condition
from ditloom.contracts.conditioner import Conditioner
from ditloom.contracts.latent import LatentSpace
from ditloom.data.batches import Batch, Batches, to_signed
from ditloom.data.order import ImageOrder
from ditloom.latents.cache import LatentCache
from ditloom.training.draws import Rows

Input = str | int | None


class Feed(Protocol):
    """What the trainer learns from. Rows follow from the image count alone."""

    def fingerprint(self) -> str:
        """Changes whenever any example does."""

    def rows(self, start: int, stop: int) -> Iterator[Rows]:
        """This process's share of each global batch from image `start` to `stop`."""


class Encoder(Protocol):
    """A conditioner, or a cache of one."""

    def encode(self, inputs: Sequence[Any]) -> Condition:
        """One row per input."""


class ConditionTable:
    """Conditions of inputs, each encoded once and kept in memory; texts are padded to one length.

    length: tokens of every text, so that all batches have one shape; None keeps the longest of each batch.
    """

    def __init__(self, conditioner: Encoder, length: int | None = None):
        self.conditioner = conditioner
        self.length = length or getattr(conditioner, "max_tokens", None)
        self._known: dict[Input, Condition] = {}

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Input]) -> Condition:
        """One row per input."""
        fresh = list(dict.fromkeys(value for value in inputs if value not in self._known))
        if fresh:
            encoded = self.conditioner.encode(fresh).to("cpu")
            if not encoded.tensors():
                return encoded
            encoded = padded(encoded, self.length)
            for row, value in enumerate(fresh):
                self._known[value] = encoded.rows(slice(row, row + 1))
        return Condition.cat([self._known[value] for value in inputs])


def padded(condition: Condition, length: int | None) -> Condition:
    """Texts with masked zeros up to `length` tokens."""
    if condition.text is None or length is None or condition.text.shape[1] >= length:
        return condition
    missing = length - condition.text.shape[1]
    mask = condition.text_mask
    if mask is None:
        mask = torch.ones(condition.text.shape[:2], dtype=torch.bool)
    text, mask = pad(condition.text, (0, 0, 0, missing)), pad(mask, (0, missing))
    return Condition(condition.label, text, mask, condition.pooled, condition.extra)


class ImageFeed:
    """Pictures of a source, encoded as they come.

    told: what the conditioner hears of an example, "label", "caption" or None. pictures: also hand out the images
    [B, C, H, W] in [-1, 1], for objectives that look at them.
    """

    def __init__(
        self,
        batches: Batches,
        latents: LatentSpace,
        conditioner: Conditioner,
        told: str | None,
        *,
        pictures: bool = False,
    ):
        self.batches, self.latents, self.told, self.pictures = batches, latents, told, pictures
        self.conditions = ConditionTable(conditioner)
        self.null = self.conditions([None]) if told is not None else None

    def fingerprint(self) -> str:
        return self.batches.source.fingerprint()

    def rows(self, start: int, stop: int) -> Iterator[Rows]:
        for batch in self.batches.from_image(start, stop):
            images = to_signed(batch["image"])
            condition = self.conditions(inputs_of(batch, self.told))
            kept = images if self.pictures else None
            yield Rows(self._encoded(images), condition, batch["index"].tolist(), self.null, kept)

    @torch.no_grad()
    def _encoded(self, images: Tensor) -> Tensor:
        place = next(self.latents.parameters(), images)
        return self.latents.encode(images.to(place.device)).to(torch.float32)


def inputs_of(batch: Batch, told: str | None) -> list[Input]:
    """What the conditioner hears of each example of a batch; an unknown label or caption is None."""
    if told is None:
        return [None] * len(batch["image"])
    if told == "caption":
        return list(batch["caption"])
    return [label if label >= 0 else None for label in batch["label"].tolist()]


class StoredFeed:
    """Latents made before: no decoding and no encoder while training.

    variants: the latents [N, C, h, w] of every example, once for each variant of it (as it is, mirrored); each image
    index draws one. conditions: one row for each of some (example, image index) pairs.
    """

    def __init__(
        self,
        variants: Sequence[Tensor | LatentCache],
        conditions: Callable[[Sequence[int], Sequence[int]], Condition],
        null: Condition | None,
        fingerprint: str,
        *,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.variants, self.conditions, self.null, self._fingerprint = variants, conditions, null, fingerprint
        self.batch, self.seed, self.rank, self.world_size = batch, seed, rank, world_size
        self.order = ImageOrder(len(variants[0]), seed)

    def fingerprint(self) -> str:
        return self._fingerprint

    def rows(self, start: int, stop: int) -> Iterator[Rows]:
        for first in range(start, stop, self.batch):
            images = np.arange(first, min(first + self.batch, stop))
            share = np.array_split(images, self.world_size)[self.rank]
            examples, indices = self.order.at(share).tolist(), share.tolist()
            yield Rows(self._latents(examples, indices), self.conditions(examples, indices), indices, self.null)

    def _latents(self, examples: Sequence[int], indices: Sequence[int]) -> Tensor:
        chosen = rng.integers(len(self.variants), (1,), self.seed, "variant", indices)[:, 0].tolist()
        rows = [taken(self.variants[variant], [example]) for variant, example in zip(chosen, examples, strict=True)]
        return torch.cat(rows)


def taken(latents: Tensor | LatentCache, examples: Sequence[int]) -> Tensor:
    """Some rows of stored latents, in float32."""
    return latents[list(examples)].float() if isinstance(latents, Tensor) else latents.rows(examples)
