"""Choosing the width of a power-function average after training (Karras et al. 2024, "EDM2", section 3.2).

Two tracks saved now and then span a space of profiles; any other width and moment is the least-squares combination.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.training.durable import explained, replace_file, tensor_chunks
from ditloom.training.ema import exponent_of

FOLDER = "averages"


@dataclass(frozen=True, order=True)
class Moment:
    """A power-function profile: the average of relative width `width` when `images` images had been seen."""

    images: int
    width: float


def save_snapshot(run: Path, moment: Moment, averages: dict[str, Tensor], dtype: torch.dtype = torch.float16) -> Path:
    """Keep a track's averages at this moment; half precision is enough to reconstruct from."""
    folder = run / FOLDER
    path = folder / f"power-{moment.width}-{moment.images:012d}.safetensors"
    reduced = {name: tensor.to(dtype) for name, tensor in averages.items()}
    facts = {"images": str(moment.images), "width": repr(moment.width)}
    with explained("save the average", path):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, tensor_chunks(reduced, facts))
    return path


def snapshots(run: Path) -> dict[Moment, Path]:
    """The saved averages of a run, by moment."""
    found = ((run / FOLDER).glob("power-*.safetensors")) if (run / FOLDER).is_dir() else ()
    return dict(sorted((_moment(path), path) for path in found))


def _moment(path: Path) -> Moment:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        facts = json.loads(file.read(length))["__metadata__"]
    return Moment(int(facts["images"]), float(facts["width"]))


def inner_product(a: Moment, b: Moment) -> float:
    """Overlap of two profiles ``(gamma + 1) tau^gamma / n^(gamma + 1)`` on [0, n] (EDM2, equation 151)."""
    gamma_a, gamma_b = exponent_of(a.width), exponent_of(b.width)
    power = gamma_b if a.images < b.images else -gamma_a
    ratio = (a.images / b.images) ** power
    longest = max(a.images, b.images)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * longest)


def coefficients(kept: Sequence[Moment], target: Moment) -> np.ndarray:
    """Weights [len(kept)], float64, whose combination of the kept profiles is nearest to the target; they sum to 1."""
    gram = np.array([[inner_product(a, b) for b in kept] for a in kept])
    overlap = np.array([inner_product(a, target) for a in kept])
    scale = 1 / np.sqrt(np.diag(gram))
    solved = np.linalg.lstsq(gram * scale[:, None] * scale, overlap * scale, rcond=1e-14)[0] * scale
    return solved / solved.sum()


def reconstruct(run: Path, width: float, images: int | None = None) -> dict[str, Tensor]:
    """The fp32 average of relative width `width` after `images` images (default: the last snapshot's moment)."""
    from safetensors import safe_open

    kept = snapshots(run)
    if not kept:
        raise UserError(f"run {run} has no saved power-function averages to reconstruct from")
    last = max(moment.images for moment in kept)
    target = Moment(last if images is None else images, width)
    if target.images > last:
        raise UserError(f"the averages of run {run} end at {last} images, an average at {images} cannot be made")
    total: dict[str, Tensor] = {}
    for weight, path in zip(coefficients(list(kept), target), kept.values(), strict=True):
        with safe_open(path, framework="pt") as file:
            _add(total, ((name, file.get_tensor(name)) for name in file.keys()), float(weight))  # noqa: SIM118
    return {name: tensor.float() for name, tensor in total.items()}


def _add(total: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]], weight: float) -> None:
    """Accumulate in float64: the weights alternate in sign and are often far above 1."""
    for name, tensor in tensors:
        part = tensor.double() * weight
        total[name] = total[name] + part if name in total else part
