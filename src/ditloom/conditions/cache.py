"""Text embeddings encoded once and kept on disk: training never runs a text encoder twice on the same caption."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ditloom.conditions.text import TextConditioner
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError


class EmbeddingCache:
    """Conditions of prompts under `folder/<encoder fingerprint>/`, memory-mapped; only new prompts are encoded.

    Each `fill` that meets new prompts adds one file (states of all prompts end to end, offsets, pooled vectors, digests
    of the prompts). A file appears whole or not at all. Another encoder, or other settings, has another folder.
    """

    def __init__(self, conditioner: TextConditioner, folder: str | Path, dtype: torch.dtype = torch.float32):
        self.conditioner, self.dtype = conditioner, dtype
        self.folder = Path(folder) / f"{conditioner.fingerprint()}-{str(dtype).removeprefix('torch.')}"
        self._parts: list[_Part] = []
        self._places: dict[str, tuple[_Part, int]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open(path)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, prompt: str | None) -> bool:
        return _digest(prompt) in self._places

    def fill(self, prompts: Iterable[str | None], batch: int = 64) -> int:
        """Encode and store what is not yet known; returns how many prompts that were."""
        wanted = {_digest(prompt): _clean(prompt) for prompt in prompts}
        missing = {digest: prompt for digest, prompt in wanted.items() if digest not in self._places}
        if missing:
            # Prompts of like length side by side need little padding.
            ordered = sorted(missing, key=lambda digest: (len(missing[digest]), digest))
            self._write(ordered, [missing[digest] for digest in ordered], batch)
        return len(missing)

    def encode(self, prompts: Sequence[str | None]) -> Condition:
        """The same rows as the conditioner's `encode`, read back; new prompts are encoded and stored first."""
        self.fill(prompts)
        rows = [part.row(place) for part, place in (self._places[_digest(prompt)] for prompt in prompts)]
        longest = max((len(text) for text, _ in rows), default=0)
        text = torch.nn.utils.rnn.pad_sequence([text for text, _ in rows], batch_first=True)
        lengths = torch.tensor([len(text) for text, _ in rows])
        return Condition(
            text=text, text_mask=torch.arange(longest) < lengths[:, None], pooled=torch.stack([p for _, p in rows])
        )

    def null(self, batch: int) -> Condition:
        """The embedding of the empty prompt, `batch` rows."""
        return self.encode([None] * batch)

    def _write(self, digests: list[str], prompts: list[str], batch: int) -> None:
        states, lengths, pooled = [], [], []
        for start in range(0, len(prompts), batch):
            condition = self.conditioner.encode(prompts[start : start + batch]).to("cpu", self.dtype)
            assert condition.text is not None and condition.text_mask is not None and condition.pooled is not None
            states.append(condition.text[condition.text_mask])
            lengths.append(condition.text_mask.sum(1))
            pooled.append(condition.pooled)
        offsets = torch.nn.functional.pad(torch.cat(lengths).cumsum(0), (1, 0))
        tensors = {"states": torch.cat(states), "offsets": offsets, "pooled": torch.cat(pooled)}
        name = hashlib.blake2b("".join(digests).encode(), digest_size=8).hexdigest()
        path = self.folder / f"{name}.safetensors"
        write_tensors(path, tensors, {"digests": json.dumps(digests)})
        self._open(path)

    def _open(self, path: Path) -> None:
        part = _Part(path)
        self._parts.append(part)
        self._places.update({digest: (part, place) for place, digest in enumerate(part.digests)})


class _Part:
    """One file of the cache; rows are read from the memory map when asked for."""

    def __init__(self, path: Path):
        try:
            self._file: Any = safe_open(path, "pt")
            self.digests: list[str] = json.loads(self._file.metadata()["digests"])
            self._offsets = self._file.get_tensor("offsets").tolist()
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}): delete it, and its captions are encoded again") from error
        self._states, self._pooled = self._file.get_slice("states"), self._file.get_slice("pooled")

    def row(self, place: int) -> tuple[Tensor, Tensor]:
        """Token states [n, d] and pooled vector [d] of one prompt."""
        first, last = self._offsets[place : place + 2]
        return self._states[first:last], self._pooled[place : place + 1][0]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file beside `path`, sync it, then give it that name."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), beside, dict(metadata))
        os.chmod(beside, 0o644)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def _clean(prompt: str | None) -> str:
    return "" if prompt is None else prompt.strip()


def _digest(prompt: str | None) -> str:
    return hashlib.blake2b(_clean(prompt).encode(), digest_size=16).hexdigest()
