"""q(x_s | x_t, x0) on a Gaussian path, s < t, and the variational bound that trains a learned variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditloom.processes.targets import Coefficients


class Posterior(NamedTuple):
    """Mean ``from_x0 x0 + from_x x``, and the logs of the smallest and largest sensible variance of a step.

    log_small: the variance given x0 (posterior, "beta tilde"); log_large: that of the forward step ("beta").
    """

    from_x0: Any
    from_x: Any
    log_small: Any
    log_large: Any


def posterior(c: Coefficients, s: Coefficients) -> Posterior:
    """Ho et al. 2020, eq. 7, for any alpha and sigma; at sigma_s = 0 the small variance is 0, its log -inf."""
    ratio = c.alpha / s.alpha
    beta = c.sigma**2 - ratio**2 * s.sigma**2
    kept = (s.sigma / c.sigma) ** 2
    return Posterior(s.alpha * beta / c.sigma**2, ratio * kept, _log(kept * beta), _log(beta))


VARIANCES: dict[str, Callable[[Posterior], Any]] = {
    "small": lambda q: q.log_small,
    "large": lambda q: q.log_large,
}


def normal_kl(mean: Tensor, log_variance: Tensor, model_mean: Tensor, model_log_variance: Tensor) -> Tensor:
    """KL(N(mean, .) || N(model_mean, .)) in nats, elementwise."""
    gap = log_variance - model_log_variance
    return 0.5 * (torch.exp(gap) - 1 - gap + (mean - model_mean).square() * torch.exp(-model_log_variance))


def decoder_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-log p in nats of 8-bit values x in [-1, 1] under a Gaussian integrated over each value's bin, elementwise.

    Half a bin is 1/255; the outermost bins (beyond +-0.999) reach to infinity; the normal distribution function is
    the tanh approximation, clamped at 1e-12 (Nichol & Dhariwal 2021).
    """
    centred, inverse = x - mean, torch.exp(-log_scale)
    below, above = _normal_cdf((centred - 1 / 255) * inverse), _normal_cdf((centred + 1 / 255) * inverse)
    inside = torch.where(x > 0.999, 1 - below, above - below)
    return -torch.log(torch.where(x < -0.999, above, inside).clamp_min(1e-12))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _log(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.log(value)
    return math.log(value) if value > 0 else -math.inf
