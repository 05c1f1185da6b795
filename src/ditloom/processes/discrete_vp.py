"""The 1000-step variance-preserving chain of DDPM and DiT, with its learned variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ditloom.contracts.errors import UnknownName
from ditloom.contracts.process import Loss
from ditloom.contracts.registry import register
from ditloom.processes.gaussian import GaussianPath, affine, per_sample, scaled
from ditloom.processes.posterior import Posterior, decoder_nll, normal_kl
from ditloom.processes.targets import Pair

SNAP = 1e-4  # a float32 t misses k / 1000 by up to 6e-5 of an index


def linear(levels: int, start: float, end: float) -> Tensor:
    """Equal steps of beta; for another number of levels both ends are multiplied by 1000 / levels."""
    scale = 1000 / levels
    return torch.linspace(scale * start, scale * end, levels, dtype=torch.float64)


def scaled_linear(levels: int, start: float, end: float) -> Tensor:
    """Equal steps of sqrt(beta) (Stable Diffusion and its family)."""
    return torch.linspace(start**0.5, end**0.5, levels, dtype=torch.float64) ** 2


def cosine(levels: int, start: float, end: float) -> Tensor:
    """squaredcos_cap_v2 (Nichol & Dhariwal 2021), beta capped at 0.999; the ends are not used."""
    edges = torch.arange(levels + 1, dtype=torch.float64) / levels
    alpha_bar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": linear,
    "scaled-linear": scaled_linear,
    "cosine": cosine,
}


@register("discrete-vp", paper="Denoising Diffusion Probabilistic Models")
@dataclass(frozen=True, kw_only=True)
class DiscreteVP(GaussianPath):
    """T noise levels with rates beta_k: index k is t = (k + 1) / T, and t = 0 is exactly data.

    Published: "linear" 1e-4 to 0.02 (DDPM, DiT, PixArt); "scaled-linear" 0.00085 to 0.012 (Stable Diffusion,
    CogVideoX), 0.02 and 0.03 (Hunyuan-DiT); "cosine". Between two indices log alpha and its slope (of central
    differences, which is the smooth curve's to second order) are interpolated linearly.
    With "+var" the loss adds the variational term of Nichol & Dhariwal 2021 (their L_hybrid with weight 1).
    """

    spacing = "respaced"
    times = "discrete"

    predicts: str = "eps"
    schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    levels: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in SCHEDULES:
            raise UnknownName("beta schedule", self.schedule, SCHEDULES)

    @property
    def span(self) -> tuple[float, float]:
        """From index 0 to the last."""
        return 1 / self.levels, 1.0

    def betas(self) -> Tensor:
        """beta_k, k = 0 .. T - 1, float64."""
        return SCHEDULES[self.schedule](self.levels, self.beta_start, self.beta_end)

    def level_of(self, index: Any) -> Any:
        """Noise level of index k."""
        return (index + 1) / self.levels

    def network_time(self, t: float | Tensor) -> float | Tensor:
        """t, but never below index 0: a network of this family was not trained on data itself."""
        return t.clamp_min(1 / self.levels) if isinstance(t, Tensor) else max(t, 1 / self.levels)

    def log_alpha(self, t: Tensor) -> Tensor:
        """log alpha, half the log of the cumulative product of 1 - beta; exact at the indices."""
        return self._interpolate(_knots(self, t.device)[0], t)

    def _interpolate(self, knots: Tensor, t: Tensor) -> Tensor:
        position = self._position(t)
        lower = position.floor().long()
        below, above = knots[lower], knots[(lower + 1).clamp_max(self.levels)]
        return below + (position - lower) * (above - below)

    def _position(self, t: Tensor) -> Tensor:
        position = (t * self.levels).clamp(0, self.levels)
        nearest = position.round()
        return torch.where((position - nearest).abs() < SNAP, nearest, position)

    def _slope(self, t: Tensor) -> Tensor:
        return self._interpolate(_knots(self, t.device)[1], t)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self._slope(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -(self.alpha(t) ** 2) * self._slope(t) / self.sigma(t)

    def half_log_snr(self, t: Tensor) -> Tensor:
        return self.log_alpha(t) - torch.log(self.sigma(t))

    def level(self, half_log_snr: Tensor) -> Tensor:
        knots = _knots(self, half_log_snr.device)[0]
        wanted = -0.5 * F.softplus(-2 * half_log_snr)
        upper = torch.searchsorted(-knots, -wanted.contiguous()).clamp(1, self.levels)
        fraction = (wanted - knots[upper - 1]) / (knots[upper] - knots[upper - 1])
        return ((upper - 1 + fraction) / self.levels).clamp(0, 1)

    def posterior(self, t: float | Tensor, t_next: float | Tensor) -> Posterior:
        """As on any path; at t_next = 0 the log of the small variance, -inf, is that of the step before."""
        q = super().posterior(t, t_next)
        floor = super().posterior(2 / self.levels, 1 / self.levels).log_small
        if isinstance(q.log_small, Tensor):
            return q._replace(log_small=torch.where(q.log_small == -math.inf, floor, q.log_small))
        return q._replace(log_small=floor) if q.log_small == -math.inf else q

    def loss(
        self, prediction: Tensor, x0: Tensor, noise: Tensor, t: float | Tensor, mask: Tensor | None = None
    ) -> Loss:
        """The path's loss, plus "vb" where the variance is learned."""
        base = super().loss(prediction, x0, noise, t, mask)
        if not self.learns_variance:
            return base
        wide = torch.promote_types(prediction.dtype, torch.float32)
        bound = self._bound(prediction.to(wide), x0.to(wide), noise.to(wide), t, mask)
        return Loss(base.total + bound, {**base.terms, "vb": bound})

    def _bound(self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Any, mask: Tensor | None) -> Tensor:
        """Bits per dimension of one reverse step; the mean is detached, so only the variance learns from it."""
        t = torch.as_tensor(t, dtype=torch.float64, device=x0.device).expand(x0.shape[0])
        t_next = (self._position(t) - 1).clamp_min(0) / self.levels
        mean, raw = self.split(prediction)
        x = self.add_noise(x0, noise, t)
        x0_hat = self.estimate(x, t, self.join(mean.detach(), raw)).x0
        q = self.posterior(t, t_next)
        weights = Pair(q.from_x0, q.from_x)
        true_mean, model_mean = affine(weights, x0, x), affine(weights, x0_hat, x)
        log_variance = self.log_variance(raw, t, t_next)
        true_log_variance = scaled(q.log_small, torch.ones_like(x0))
        kl = per_sample(normal_kl(true_mean, true_log_variance, model_mean, log_variance), mask)
        nll = per_sample(decoder_nll(x0, model_mean, 0.5 * log_variance), mask)
        return torch.where(t_next == 0, nll, kl) / math.log(2)


@lru_cache(maxsize=32)
def _knots(process: DiscreteVP, device: torch.device) -> tuple[Tensor, Tensor]:
    """log alpha and its slope at t = 0, 1/T, ..., 1, [T + 1] each; slopes by central differences."""
    logs = 0.5 * torch.log1p(-process.betas()).cumsum(0)
    logs = torch.cat([torch.zeros(1, dtype=torch.float64), logs])
    slopes = torch.gradient(logs, spacing=1 / process.levels)[0]
    return logs.to(device), slopes.to(device)
