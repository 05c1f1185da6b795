"""Does a class-conditional model draw the class it was asked for? The share of samples a classifier agrees on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register
from ditloom.measure.evidence import Case, Evidence, Reading
from ditloom.measure.features import Classifier


def agreement(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest of [N, K] is at the label, [N] of 0 and 1 in float64."""
    return (logits.argmax(1) == labels).double()


@register("accuracy")
@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of drawn pictures classified as asked for, over all and in each class; errors are binomial.

    Beside it the same classifier's accuracy on the held-out real pictures, above which nothing can be read.
    """

    by_class: bool = True

    def __call__(self, evidence: Evidence) -> list[Reading]:
        classifier = evidence.extractor
        if not isinstance(classifier, Classifier):
            raise UserError(f"accuracy needs an extractor that classifies, as fashion-cnn does; got {classifier.tag}")
        asked = _labels(evidence.cases)
        with torch.no_grad():
            right = agreement(classifier.logits(evidence.drawn_features), asked)
            real = agreement(classifier.logits(evidence.held_out_features), _labels(evidence.held_out.cases))
        held_out = {"held_out": len(real), "held_out_accuracy": round(float(real.mean()), 4)}
        readings = [_share("accuracy", right, held_out)]
        for label in asked.unique().tolist() if self.by_class else ():
            rows = right[asked == label]
            readings.append(_share(f"accuracy/{classifier.classes[label]}", rows, {"class_samples": len(rows)}))
        return readings


def _labels(cases: tuple[Case, ...]) -> Tensor:
    if any(case.label is None for case in cases):
        raise UserError("accuracy needs a class label for every picture")
    return torch.tensor([case.label for case in cases], dtype=torch.int64)


def _share(name: str, right: Tensor, facts: dict[str, Any]) -> Reading:
    share = float(right.mean())
    return Reading(name, share, (share * (1 - share) / len(right)) ** 0.5, facts)
