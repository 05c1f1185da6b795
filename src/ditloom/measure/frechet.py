"""Frechet distance of two Gaussians fitted to features (Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update
Rule", equation 6; Dowson & Landau 1982).

    d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

It is called FID only with the Inception network of that paper; everywhere else its name says the extractor. It is
biased upwards by about 1/N, so only numbers of equal N compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register
from ditloom.measure.evidence import Evidence, Reading


@dataclass(frozen=True)
class Moments:
    """Number of vectors, mean [d] and unbiased covariance [d, d], float64."""

    count: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of features [N, d], N at least 2."""
        return RunningMoments().update(features).moments()


class RunningMoments:
    """Mean and scatter of a stream, merged pairwise in float64 (Chan, Golub & LeVeque 1983, equation 2.1)."""

    def __init__(self, count: int = 0, mean: Tensor | None = None, scatter: Tensor | None = None):
        self.count, self.mean, self.scatter = count, mean, scatter

    def update(self, features: Tensor) -> RunningMoments:
        """Add features [B, d]."""
        if features.ndim != 2:
            raise UserError(f"expected features [N, d], got {list(features.shape)}")
        if not len(features):
            return self
        x = features.detach().to("cpu", torch.float64)
        mean = x.mean(0)
        centred = x - mean
        return self.merge(RunningMoments(len(x), mean, centred.T @ centred))

    def merge(self, other: RunningMoments) -> RunningMoments:
        """Add what another stream (another rank) has seen."""
        if other.mean is None or other.scatter is None:
            return self
        if self.mean is None or self.scatter is None:
            self.count, self.mean, self.scatter = other.count, other.mean, other.scatter
            return self
        total = self.count + other.count
        shift = other.mean - self.mean
        self.scatter = self.scatter + other.scatter + torch.outer(shift, shift) * (self.count * other.count / total)
        self.mean = self.mean + shift * (other.count / total)
        self.count = total
        return self

    def moments(self) -> Moments:
        """What has been seen so far; a covariance needs two vectors."""
        if self.mean is None or self.scatter is None or self.count < 2:
            raise UserError(f"a covariance needs at least 2 pictures, got {self.count}")
        return Moments(self.count, self.mean, self.scatter / (self.count - 1))


def moments_of(batches: Iterable[Tensor]) -> Moments:
    """Moments of a stream of feature batches."""
    running = RunningMoments()
    for batch in batches:
        running.update(batch)
    return running.moments()


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance, float64; singular covariances (N < d) are fine."""
    if a.mean.shape != b.mean.shape:
        raise UserError(f"features of {a.mean.numel()} and of {b.mean.numel()} dimensions cannot be compared")
    means = (a.mean - b.mean).square().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return max(0.0, float(means + traces - 2 * trace_of_root(a.covariance, b.covariance)))


def trace_of_root(a: Tensor, b: Tensor) -> Tensor:
    """tr((a b)^(1/2)) of two symmetric non-negative matrices: a^(1/2) b a^(1/2) is similar to a b and symmetric."""
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    product = root @ b @ root
    return torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()


@register("frechet", paper="Heusel et al. 2017, arXiv:1706.08500")
@dataclass(frozen=True, kw_only=True)
class Frechet:
    """Frechet distance of the drawn pictures to the training pictures, with both N stated."""

    def __call__(self, evidence: Evidence) -> list[Reading]:
        real = Moments.of(evidence.training_features)
        value = frechet_distance(Moments.of(evidence.drawn_features), real)
        return [Reading("frechet", value, facts={"reference": "training", "reference_samples": real.count})]
