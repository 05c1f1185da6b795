"""What a network may predict on a Gaussian path. Every conversion is affine: ``value = a x + b prediction``.

A target is defined by one pair, ``target = a x0 + b eps``; the rest follows by solving it together with
``x = alpha x0 + sigma eps``. Pairs are Python floats for a scalar t and float64 tensors otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple


class Coefficients(NamedTuple):
    """alpha, sigma and their derivatives by t at one noise level: floats, or float64 tensors shaped like t."""

    alpha: Any
    sigma: Any
    d_alpha: Any
    d_sigma: Any


class Pair(NamedTuple):
    """Two factors of an affine map."""

    a: Any
    b: Any


IDENTITY = Pair(0.0, 1.0)


@dataclass(frozen=True)
class Target(ABC):
    """One kind of prediction."""

    tells_noise_of_data: ClassVar[bool] = True  # whether eps can be read off at sigma = 0

    @abstractmethod
    def of_data(self, c: Coefficients) -> Pair:
        """``target = a x0 + b eps``."""

    def x0(self, c: Coefficients) -> Pair:
        """``x0 = a x + b prediction``."""
        a, b = self.of_data(c)
        det = c.alpha * b - c.sigma * a
        return Pair(b / det, -c.sigma / det)

    def eps(self, c: Coefficients) -> Pair:
        """``eps = a x + b prediction``."""
        a, b = self.of_data(c)
        det = c.alpha * b - c.sigma * a
        return Pair(-a / det, c.alpha / det)

    def v(self, c: Coefficients) -> Pair:
        """``dx/dt = alpha' x0 + sigma' eps = a x + b prediction``."""
        x0, eps = self.x0(c), self.eps(c)
        return Pair(c.d_alpha * x0.a + c.d_sigma * eps.a, c.d_alpha * x0.b + c.d_sigma * eps.b)

    def score(self, c: Coefficients) -> Pair:
        """``grad log p_t(x) = -eps / sigma = a x + b prediction``."""
        a, b = self.eps(c)
        return Pair(-a / c.sigma, -b / c.sigma)

    def unit(self, c: Coefficients) -> Any:
        """The regression error is this times (prediction - target): finite where the target itself is not."""
        return 1.0


class Eps(Target):
    """The noise (Ho et al. 2020)."""

    def of_data(self, c: Coefficients) -> Pair:
        return Pair(0.0, 1.0)

    def x0(self, c: Coefficients) -> Pair:
        return Pair(1 / c.alpha, -c.sigma / c.alpha)

    def eps(self, c: Coefficients) -> Pair:
        return IDENTITY


class Data(Target):
    """The clean data."""

    tells_noise_of_data = False

    def of_data(self, c: Coefficients) -> Pair:
        return Pair(1.0, 0.0)

    def x0(self, c: Coefficients) -> Pair:
        return IDENTITY

    def eps(self, c: Coefficients) -> Pair:
        return Pair(1 / c.sigma, -c.alpha / c.sigma)


class Velocity(Target):
    """dx/dt along the path (Lipman et al. 2023; SiT)."""

    def of_data(self, c: Coefficients) -> Pair:
        return Pair(c.d_alpha, c.d_sigma)

    def v(self, c: Coefficients) -> Pair:
        return IDENTITY


class Score(Target):
    """grad log p_t; trained in the form ``sigma s + eps`` (SiT), which stays finite at sigma = 0."""

    tells_noise_of_data = False

    def of_data(self, c: Coefficients) -> Pair:
        return Pair(0.0, -1 / c.sigma)

    def x0(self, c: Coefficients) -> Pair:
        return Pair(1 / c.alpha, c.sigma * c.sigma / c.alpha)

    def eps(self, c: Coefficients) -> Pair:
        return Pair(0.0, -c.sigma)

    def score(self, c: Coefficients) -> Pair:
        return IDENTITY

    def unit(self, c: Coefficients) -> Any:
        return c.sigma


class TrigVelocity(Target):
    """``alpha eps - sigma x0`` (Salimans & Ho 2022), the "v" of diffusers' v_prediction."""

    def of_data(self, c: Coefficients) -> Pair:
        return Pair(-c.sigma, c.alpha)


@dataclass(frozen=True)
class Preconditioned(Target):
    """The raw output F of EDM's network, ``x0 = c_skip x + c_out F`` (Karras et al. 2022, eq. 7 and table 1).

    For data of standard deviation sigma_data the target has unit variance at every level. Written for any alpha;
    with alpha = 1 it is EDM's own.
    """

    sigma_data: float = 0.5

    def of_data(self, c: Coefficients) -> Pair:
        spread = self._spread(c)
        return Pair(c.sigma / (self.sigma_data * spread), -self.sigma_data * c.alpha / spread)

    def x0(self, c: Coefficients) -> Pair:
        spread = self._spread(c)
        c_skip = c.alpha * (self.sigma_data / spread) ** 2
        return Pair(c_skip, c.sigma * self.sigma_data / spread)

    def _spread(self, c: Coefficients) -> Any:
        return (c.alpha**2 * self.sigma_data**2 + c.sigma**2) ** 0.5


TARGETS: dict[str, type[Target]] = {
    "eps": Eps,
    "x0": Data,
    "v": Velocity,
    "score": Score,
    "v-trig": TrigVelocity,
    "edm": Preconditioned,
}
