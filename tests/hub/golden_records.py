"""Records of official modules, one file of golden/ a family: what was given, what came out, where it is from.

Tensor j of the sorted names (tables excluded) is filled by `formula(shape, j, 0.3)`; x is tensor 1000 at scale 1.5.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.backbone import Backbone
from ditloom.hub.checkpoint import foreign_state_dict, load_foreign
from tests.hub.test_golden import formula

FOLDER = Path(__file__).with_name("golden")


def golden(name: str) -> dict[str, Any]:
    """The records of one file, by case."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def filled(config: Any, format: str, table: Callable[[str], bool] = lambda k: k == "pos_embed") -> dict[str, Tensor]:
    """The official names with the formula's weights; tables as they are."""
    theirs = foreign_state_dict(config.build(), format)
    names = sorted(k for k in theirs if not table(k))
    return {**theirs, **{k: formula(tuple(theirs[k].shape), j, 0.3) for j, k in enumerate(names)}}


def loaded(config: Any, format: str, tensors: int, **options: Any) -> Backbone:
    """A model with those weights, read as a checkpoint of the original project; it has that many tensors."""
    theirs = filled(config, format, **options)
    assert len(theirs) == tensors
    return load_foreign(theirs, config, format).eval()


def x_of(config: Any, rows: int = 3, size: tuple[int, int] | None = None) -> Tensor:
    """The input of a record."""
    height, width = size or (config.image_size, config.image_size)
    return formula((rows, config.channels, height, width), 1000, 1.5)


def assert_equals(found: Tensor, record: dict[str, Any], sign: int = 1, tolerance: float = 1e-5) -> None:
    """`found` is the record's output, in our sign, to `tolerance` of its largest value."""
    expected = sign * torch.tensor(record["output"]).reshape(record["shape"])
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
