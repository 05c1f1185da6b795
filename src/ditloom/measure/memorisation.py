"""Are the pictures copies of the training set? Distance to the nearest training picture, against held-out real ones.

The comparison of two samples' distances to a third is the data-copying test of Meehan, Chaudhuri & Dasgupta 2020
("A Non-Parametric Test to Detect Data-Copying in Generative Models", section 3), here as the share of pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register
from ditloom.measure.evidence import Evidence, Reading

CHUNK = 256


def nearest_training(queries: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance to the nearest training vector and its row, both [N], from [N, d] and [M, d]."""
    if not len(training):
        raise UserError("there are no training pictures to measure the distance to")
    training = training.double()
    squares = training.square().sum(1)
    distances, rows = [], []
    for part in queries.double().split(CHUNK):
        # only the row is read off the expanded form, whose rounding would hide the zero of an exact copy
        row = (squares - 2 * part @ training.T).argmin(1)
        distances.append((part - training[row]).norm(dim=1))
        rows.append(row)
    return torch.cat(distances), torch.cat(rows)


def share_closer(drawn: Tensor, held_out: Tensor) -> float:
    """Share of pairs in which the drawn one's distance is the smaller, ties half: the Mann-Whitney statistic."""
    ordered = held_out.sort().values
    above = len(ordered) - torch.searchsorted(ordered, drawn, right=True)
    level = torch.searchsorted(ordered, drawn, right=True) - torch.searchsorted(ordered, drawn, right=False)
    return float((above + level / 2).sum() / (len(drawn) * len(held_out)))


@register("memorisation", paper="Meehan et al. 2020, arXiv:2004.05675")
@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """Median distance to the nearest training picture of the drawn and of the held-out pictures, and their order.

    `memorisation/closer` is 0.5 when drawn pictures are no nearer to the training set than unseen real ones are, and
    1 when each is nearer than all of those.
    """

    def __call__(self, evidence: Evidence) -> list[Reading]:
        drawn, _ = nearest_training(evidence.drawn_features, evidence.training_features)
        held_out, _ = nearest_training(evidence.held_out_features, evidence.training_features)
        facts = {"training": len(evidence.training_features)}
        both = {**facts, "held_out": len(held_out)}
        return [
            Reading("memorisation/median-distance", float(drawn.quantile(0.5)), None, facts),
            Reading("memorisation/held-out-median-distance", float(held_out.quantile(0.5)), None, both),
            Reading("memorisation/closer", share_closer(drawn, held_out), None, both),
        ]
