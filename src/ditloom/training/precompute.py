"""Latents and texts of a whole source made before training, kept in a folder, and the feed that reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ditloom.conditions.cache import EmbeddingCache
from ditloom.conditions.text import TextConditioner
from ditloom.contracts import rng
from ditloom.contracts.condition import Condition
from ditloom.contracts.conditioner import Conditioner
from ditloom.contracts.data import DataSource, Example, SourceInfo
from ditloom.contracts.errors import UserError
from ditloom.contracts.latent import LatentSpace
from ditloom.data.augment import DRAWS, Augment
from ditloom.latents.cache import encode_source
from ditloom.training.durable import explained, replace_file
from ditloom.training.feed import ConditionTable, Input, StoredFeed
from ditloom.training.launch import World


class Prepared:
    """A source with every picture brought to one size, and mirrored if asked for."""

    def __init__(self, source: DataSource, size: int | None, mirrored: bool = False):
        self.source, self.size, self.mirrored = source, size, mirrored
        side = source.info.size if size is None else (size, size)
        self.info: SourceInfo = replace(source.info, size=side)
        self._change = Augment(flip=1.0 if mirrored else 0.0)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        return replace(example, image=self._change(example.image, np.zeros(DRAWS), self.size))

    def fingerprint(self) -> str:
        text = f"{self.source.fingerprint()} {self.size} {self.mirrored}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Told:
    """What the conditioner hears of each example, known without opening a picture.

    wordings: for each example its inputs, of which each image index draws one.
    """

    def __init__(self, wordings: Sequence[Sequence[Input]], table: ConditionTable, seed: int):
        self.wordings, self.table, self.seed = wordings, table, seed

    def __call__(self, examples: Sequence[int], indices: Sequence[int]) -> Condition:
        draws = rng.uniform((1,), self.seed, "wording", indices)[:, 0].tolist()
        choices = [self.wordings[example] for example in examples]
        return self.table([inputs[int(draw * len(inputs))] for inputs, draw in zip(choices, draws, strict=True)])


def stored_feed(
    source: DataSource,
    latents: LatentSpace,
    conditioner: Conditioner,
    folder: str | Path,
    *,
    told: str | None,
    batch: int,
    seed: int = 0,
    size: int | None = None,
    augment: Augment | None = None,
    wordings: bool = False,
    world: World | None = None,
) -> StoredFeed:
    """Encode the source into `folder` (once; an interrupted encoding goes on) and open the feed that reads it.

    Only mirroring can be kept; an augmentation that moves or zooms is refused. The leader encodes, the others wait.
    """
    world, augment, folder = world or World(), augment or Augment(), Path(folder)
    if augment.moves or augment.flip not in (0.0, 0.5):
        raise UserError("stored latents allow augment flip=0 or flip=0.5 only: drop shift and scale, or store nothing")
    prepared = [Prepared(source, size, mirrored) for mirrored in ((False, True) if augment.flip else (False,))]
    folders = [folder / ("mirrored" if one.mirrored else "plain") for one in prepared]
    if world.leader:
        for one, place in zip(prepared, folders, strict=True):
            encode_source(one, latents, place)
        _write_told(source, folder, wordings)
    world.share(None)
    variants = [encode_source(one, latents, place) for one, place in zip(prepared, folders, strict=True)]
    encoder = EmbeddingCache(conditioner, folder / "texts") if isinstance(conditioner, TextConditioner) else conditioner
    table = ConditionTable(encoder, getattr(conditioner, "max_tokens", None))
    inputs = [choices_of(row, told) for row in _read_told(folder)]
    if isinstance(encoder, EmbeddingCache) and told is not None and world.leader:
        encoder.fill([text for choices in inputs for text in choices if text is None or isinstance(text, str)])
    world.share(None)
    null = table([None]) if told is not None else None
    fingerprint = " ".join([*(one.fingerprint() for one in prepared), str(told), str(wordings)])
    fingerprint = hashlib.blake2b(fingerprint.encode(), digest_size=16).hexdigest()
    conditions = Told(inputs, table, seed)
    return StoredFeed(
        variants, conditions, null, fingerprint, batch=batch, seed=seed, rank=world.rank, world_size=world.size
    )


def choices_of(row: dict[str, list[Input]], told: str | None) -> list[Input]:
    """The inputs of one example: its label, its captions, or nothing."""
    return row.get(told or "", [None]) or [None]


def _write_told(source: DataSource, folder: Path, wordings: bool) -> None:
    path = folder / "told.json"
    mark = f"{source.fingerprint()} {wordings}"
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["mark"] == mark:
        return
    rows = []
    for index in range(len(source)):
        example = source[index]
        captions = list(source.texts(index)) if wordings and hasattr(source, "texts") else [example.caption]
        rows.append({"label": [example.label], "caption": captions})
    with explained("write", path):
        replace_file(path, [json.dumps({"mark": mark, "rows": rows}).encode()])


def _read_told(folder: Path) -> list[dict[str, list[Input]]]:
    rows: list[dict[str, list[Input]]] = json.loads((folder / "told.json").read_text(encoding="utf-8"))["rows"]
    return rows
