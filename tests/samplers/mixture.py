"""An oracle with a closed form: data from a Gaussian mixture, so scores, marginals and flows are all known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditloom.processes.gaussian import GaussianEstimate, GaussianPath, affine

WEIGHTS, MEANS, DEVIATIONS = (0.35, 0.65), (-1.1, 0.8), (0.35, 0.5)


@dataclass
class Mixture:
    """Independent mixtures per element, float64; `calls` counts evaluations."""

    path: GaussianPath
    weights: tuple[float, ...] = WEIGHTS
    means: tuple[float, ...] = MEANS
    deviations: tuple[float, ...] = DEVIATIONS
    calls: int = 0

    def _parts(self, t: float) -> tuple[Tensor, Tensor, Tensor]:
        c = self.path.at(t)
        weights, means, stds = (
            torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.deviations)
        )
        return weights, c.alpha * means, torch.sqrt(c.alpha**2 * stds**2 + c.sigma**2)

    def score(self, x: Tensor, t: float) -> Tensor:
        """grad log p_t, elementwise."""
        weights, means, stds = self._parts(t)
        gap = (means - x.unsqueeze(-1)) / stds
        share = torch.softmax(torch.log(weights) - torch.log(stds) - gap**2 / 2, -1)
        return (share * gap / stds).sum(-1)

    def x0(self, x: Tensor, t: float) -> Tensor:
        """E[x0 | x_t = x], elementwise."""
        c = self.path.at(t)
        weights, means, stds = self._parts(t)
        gap = x.unsqueeze(-1) - means
        share = torch.softmax(torch.log(weights) - torch.log(stds) - (gap / stds) ** 2 / 2, -1)
        own_means, own = (torch.tensor(v, dtype=torch.float64) for v in (self.means, self.deviations))
        return (share * (own_means + c.alpha * own**2 / stds**2 * gap)).sum(-1)

    def __call__(self, x: Tensor, t: float, *, step: int, evaluation: int = 0, told: float | None = None):
        """What a perfect network would say, in the target of the path."""
        self.calls += 1
        c = self.path.at(t)
        x0, eps = self.x0(x, t), -c.sigma * self.score(x, t)
        return GaussianEstimate(self.path, x, t, affine(self.path.kind.of_data(c), x0, eps))

    def cdf(self, x: Tensor, t: float) -> Tensor:
        """P(x_t <= x), elementwise."""
        weights, means, stds = self._parts(t)
        return (weights * torch.special.ndtr((x.unsqueeze(-1) - means) / stds)).sum(-1)

    def flow(self, x: Tensor, t: float, t_next: float) -> Tensor:
        """The exact probability flow: in one dimension it keeps quantiles."""
        wanted, low, high = self.cdf(x, t), torch.full_like(x, -2000.0), torch.full_like(x, 2000.0)
        for _ in range(90):
            middle = (low + high) / 2
            below = self.cdf(middle, t_next) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def starts(path: GaussianPath, t: float = 1.0, count: int = 41) -> Tensor:
    """Quantiles of the mixture's own marginal at t, so that the flow to data is exact."""
    c = path.at(t)
    u = torch.linspace(0.02, 0.98, count, dtype=torch.float64)
    spread = (c.alpha**2 + c.sigma**2) ** 0.5
    return torch.special.ndtri(u) * spread


def no_noise(step: int, evaluation: int = 0) -> Tensor:
    """For samplers that must not ask."""
    raise AssertionError("a deterministic sampler asked for noise")
