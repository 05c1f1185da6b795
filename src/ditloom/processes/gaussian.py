"""Gaussian paths ``x_t = alpha(t) x0 + sigma(t) eps``: noise, target, loss, ancestral step, and one estimate.

A path is two curves with their derivatives; everything else follows. Curves and coefficients run in float64, and
only the factors of the final sums take the dtype of x.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.process import Estimate, Loss, Process
from ditloom.contracts.settings import named
from ditloom.processes.posterior import VARIANCES, Posterior, posterior
from ditloom.processes.targets import TARGETS, Coefficients, Pair, Target
from ditloom.processes.weights import WEIGHTS, LossWeight

LEARNED_VARIANCE = "+var"


@dataclass(frozen=True, kw_only=True)
class GaussianPath(Process):
    """A path from data to Gaussian noise with a prediction target and a loss.

    predicts: "eps", "x0", "v", "score", "v-trig" or "edm"; with the suffix "+var" the network has twice the channels
    and the second half sets the variance of the ancestral step (Nichol & Dhariwal 2021).
    weight: loss weight, such as "min-snr:gamma=5". direction: factor of the term 1 - cos(prediction, target) along
    the channels (FasterDiT). variance: of the ancestral step where it is not learned, "small" or "large".
    channel_axis: where channels are (1 for images, -1 for tokens).
    """

    predicts: str = "v"
    weight: str = "uniform"
    direction: float = 0.0
    variance: str = "small"
    channel_axis: int = 1

    def __post_init__(self) -> None:
        named("target", TARGETS, self.predicts.removesuffix(LEARNED_VARIANCE))
        named("loss weight", WEIGHTS, self.weight)
        if self.variance not in VARIANCES:
            raise UnknownName("variance", self.variance, VARIANCES)

    # The curves, of float64 tensors.

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Data coefficient."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise coefficient."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """d sigma / dt."""

    @abstractmethod
    def half_log_snr(self, t: Tensor) -> Tensor:
        """lambda = log(alpha / sigma), infinite at the ends of most paths."""

    @abstractmethod
    def level(self, half_log_snr: Tensor) -> Tensor:
        """The noise level t of a lambda, the inverse of `half_log_snr`."""

    def at(self, t: float | Tensor) -> Coefficients:
        """All four curves at once: Python floats for a float t, else float64 tensors."""
        if isinstance(t, Tensor):
            return self._curves(t.to(torch.float64))
        return _at_float(self, float(t))

    def table(self, times: Sequence[float]) -> list[Coefficients]:
        """Coefficients at many levels, as Python floats."""
        columns = self._curves(torch.tensor(times, dtype=torch.float64))
        return [Coefficients(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]

    def lambdas(self, times: Sequence[float]) -> list[float]:
        """lambda at many levels, as Python floats."""
        return self.half_log_snr(torch.tensor(times, dtype=torch.float64)).tolist()

    def _curves(self, t: Tensor) -> Coefficients:
        return Coefficients(self.alpha(t), self.sigma(t), self.d_alpha(t), self.d_sigma(t))

    # The process.

    @cached_property
    def kind(self) -> Target:
        """The prediction target."""
        return named("target", TARGETS, self.predicts.removesuffix(LEARNED_VARIANCE))

    @cached_property
    def loss_weight(self) -> LossWeight:
        """The loss weight."""
        return named("loss weight", WEIGHTS, self.weight)

    @property
    def learns_variance(self) -> bool:
        """Whether predictions have a second half for the variance."""
        return self.predicts.endswith(LEARNED_VARIANCE)

    def prior(self, noise: Tensor, t: float = 1.0) -> Tensor:
        """Unit Gaussian noise."""
        return noise

    def add_noise(self, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """``alpha x0 + sigma noise``."""
        c = self.at(t)
        return affine(Pair(c.alpha, c.sigma), x0, noise)

    def target(self, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """What the network should predict (its first half, with a learned variance)."""
        return affine(self.kind.of_data(self.at(t)), x0, noise)

    def loss(
        self, prediction: Tensor, x0: Tensor, noise: Tensor, t: float | Tensor, mask: Tensor | None = None
    ) -> Loss:
        """Weighted squared error per sample, plus the direction term. Terms: "mse", and "direction" if asked for."""
        wide = torch.promote_types(prediction.dtype, torch.float32)
        prediction, c = self.split(prediction)[0].to(wide), self.at(t)
        x0, noise = x0.to(wide), noise.to(wide)
        unit = self.kind.unit(c)
        aim = Pair(*(unit * k for k in self.kind.of_data(c)))
        error = (scaled(unit, prediction) - affine(aim, x0, noise)).square()
        terms = {"mse": per_sample(error, mask)}
        factor = self.loss_weight.for_target(self.kind, c)
        total = terms["mse"] if _is_one(factor) else per_sample(scaled(factor, error), mask)
        if self.direction:
            terms["direction"] = self._misalignment(prediction, self.target(x0, noise, t), mask)
            total = total + self.direction * terms["direction"]
        return Loss(total, terms)

    def _misalignment(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        cosine = F.cosine_similarity(prediction, target, dim=self.channel_axis).unsqueeze(self.channel_axis)
        return per_sample(1 - cosine, None if mask is None else mask.amax(self.channel_axis, keepdim=True))

    def estimate(self, x: Tensor, t: float | Tensor, prediction: Tensor) -> GaussianEstimate:
        """What a prediction made at (x, t) says."""
        return GaussianEstimate(self, x, t, prediction)

    def split(self, prediction: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean half and variance half."""
        if not self.learns_variance:
            return prediction, None
        channels = prediction.shape[self.channel_axis]
        if channels % 2:
            raise UserError(f"a learned variance needs an even number of predicted channels, got {channels}")
        mean, variance = prediction.chunk(2, dim=self.channel_axis)
        return mean, variance

    def join(self, guided: Tensor, rest: Tensor | None) -> Tensor:
        """The inverse of `split`."""
        return guided if rest is None else torch.cat([guided, rest], dim=self.channel_axis)

    def posterior(self, t: float | Tensor, t_next: float | Tensor) -> Posterior:
        """Coefficients of q(x_next | x_t, x0)."""
        return posterior(self.at(t), self.at(t_next))

    def step(self, estimate: Estimate, t_next: float, noise: Tensor) -> Tensor:
        """Ancestral step ``mean(x0, x) + exp(log_variance / 2) noise``; at t_next = 0 the mean alone."""
        assert isinstance(estimate, GaussianEstimate)
        q = self.posterior(estimate.t, t_next)
        mean = affine(Pair(q.from_x0, q.from_x), estimate.x0, estimate.x)
        if t_next == 0:
            return mean
        log_variance = estimate.log_variance(t_next)
        deviation = torch.exp(0.5 * log_variance) if isinstance(log_variance, Tensor) else math.exp(0.5 * log_variance)
        return mean + deviation * noise

    def log_variance(self, raw: Tensor | None, t: float | Tensor, t_next: float | Tensor) -> Any:
        """log of the ancestral variance: ``f log beta + (1 - f) log posterior``, f = (raw + 1) / 2 where learned."""
        q = self.posterior(t, t_next)
        if raw is None:
            return VARIANCES[self.variance](q)
        low, high = q.log_small, q.log_large
        return affine(Pair(0.5 * (high - low), 0.5 * (high + low)), raw, torch.ones_like(raw))


@dataclass(frozen=True)
class GaussianEstimate(Estimate):
    """A prediction and everything it implies, converted when asked for."""

    path: GaussianPath
    x: Tensor
    t: float | Tensor
    prediction: Tensor

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor | None]:
        return self.path.split(self.prediction)

    @cached_property
    def _at(self) -> Coefficients:
        return self.path.at(self.t)

    def _convert(self, conversion: Callable[[Coefficients], Pair]) -> Tensor:
        try:
            return affine(conversion(self._at), self.x, self._parts[0])
        except ZeroDivisionError:
            what, predicts = conversion.__name__, self.path.predicts
            raise UserError(f"{what} of a {predicts!r} prediction is undefined at noise level {self.t}") from None

    @cached_property
    def x0(self) -> Tensor:
        """The data estimate."""
        return self._convert(self.path.kind.x0)

    @cached_property
    def eps(self) -> Tensor:
        """The noise estimate."""
        return self._convert(self.path.kind.eps)

    @cached_property
    def v(self) -> Tensor:
        """The velocity dx/dt."""
        return self._convert(self.path.kind.v)

    @cached_property
    def score(self) -> Tensor:
        """grad log p_t(x)."""
        return self._convert(self.path.kind.score)

    def log_variance(self, t_next: float | Tensor) -> Any:
        """log variance of the ancestral step to t_next: a tensor where learned or t is one, else a float."""
        return self.path.log_variance(self._parts[1], self.t, t_next)

    def clipped(self, limit: float) -> GaussianEstimate:
        """The same with x0 clamped; eps and v follow."""
        return self.of("x0", self.x0.clamp(-limit, limit))

    def of(self, kind: str, value: Tensor) -> GaussianEstimate:
        """The same place and variance with another content, given as "x0", "eps", "v" or "score"."""
        suffix = LEARNED_VARIANCE if self.path.learns_variance else ""
        path = _retargeted(self.path, kind + suffix)
        return GaussianEstimate(path, self.x, self.t, path.join(value, self._parts[1]))


def affine(pair: Pair, x: Tensor, y: Tensor) -> Tensor:
    """``a x + b y``; a pair (0, 1) gives y itself."""
    if isinstance(pair.a, float) and pair.a == 0:
        return scaled(pair.b, y)
    return scaled(pair.a, x) + scaled(pair.b, y)


def scaled(factor: Any, x: Tensor) -> Tensor:
    """``factor x``: a float, or a tensor aligned with the leading axes of x that takes its dtype and device."""
    if not isinstance(factor, Tensor):
        return x if factor == 1 else factor * x
    shaped = factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim))
    return shaped.to(x.device, x.dtype) * x


def per_sample(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over all but the first axis, [B]; of the masked positions only where a mask is given."""
    if mask is None:
        return values.flatten(1).mean(1)
    mask = mask.expand_as(values).to(values.dtype).flatten(1)
    return (values.flatten(1) * mask).sum(1) / mask.sum(1).clamp_min(1)


def require_gaussian(process: Process, who: str) -> GaussianPath:
    """The process as a Gaussian path, or a clear refusal."""
    if not isinstance(process, GaussianPath):
        raise UserError(f"{who} needs a Gaussian process, got {type(process).__name__}; try the sampler 'ddpm'")
    return process


def _is_one(factor: Any) -> bool:
    return isinstance(factor, float) and factor == 1


@lru_cache(maxsize=4096)
def _at_float(path: GaussianPath, t: float) -> Coefficients:
    return path.table([t])[0]


@lru_cache(maxsize=64)
def _retargeted(path: GaussianPath, kind: str) -> GaussianPath:
    return replace(path, predicts=kind)
