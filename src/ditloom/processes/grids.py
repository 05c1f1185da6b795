"""Grids of noise levels: where a sampler evaluates. Each is float64, descending, of `steps` levels and then 0."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.process import Process
from ditloom.contracts.settings import named
from ditloom.processes.discrete_vp import DiscreteVP
from ditloom.processes.gaussian import GaussianPath, require_gaussian
from ditloom.processes.shift import shift


@dataclass(frozen=True)
class Grid(ABC):
    """A rule for placing noise levels."""

    @abstractmethod
    def levels(self, process: Process, steps: int) -> Tensor:
        """The `steps` levels above 0, descending."""


class Uniform(Grid):
    """Equal steps in t from the highest level to 0 (flow matching; with a shift, SD3, FLUX and LightningDiT)."""

    def levels(self, process: Process, steps: int) -> Tensor:
        return torch.linspace(process.span[1], 0, steps + 1, dtype=torch.float64)[:-1]


@dataclass(frozen=True)
class Karras(Grid):
    """Equal steps in ``(sigma / alpha)^(1 / rho)`` from sigma_max to sigma_min (Karras et al. 2022, eq. 5).

    None: those of an EDM process, else the published 80 and 0.002, as far as the process reaches.
    """

    rho: float = 7.0
    sigma_min: float | None = None
    sigma_max: float | None = None

    def levels(self, process: Process, steps: int) -> Tensor:
        path = require_gaussian(process, "the Karras grid")
        low, high = (r ** (1 / self.rho) for r in _ratios(path, self.sigma_min, self.sigma_max))
        sigmas = torch.linspace(high, low, steps, dtype=torch.float64) ** self.rho
        return path.level(-torch.log(sigmas))


@dataclass(frozen=True)
class LogSNR(Grid):
    """Equal steps in log(alpha / sigma) (DPM-Solver), between the noise-to-signal ratios of `Karras`."""

    sigma_min: float | None = None
    sigma_max: float | None = None

    def levels(self, process: Process, steps: int) -> Tensor:
        path = require_gaussian(process, "the log-SNR grid")
        low, high = (math.log(r) for r in _ratios(path, self.sigma_min, self.sigma_max))
        return path.level(-torch.linspace(high, low, steps, dtype=torch.float64))


def _ratios(path: GaussianPath, low: float | None, high: float | None) -> tuple[float, float]:
    """The given noise-to-signal ratios within what the span reaches; else EDM's own, or its published ones."""
    low = low if low is not None else getattr(path, "sigma_min", 0.002)
    high = high if high is not None else getattr(path, "sigma_max", 80.0)
    ends = torch.exp(-path.half_log_snr(torch.tensor(path.span, dtype=torch.float64)))
    return max(low, ends[0].item()), min(high, ends[1].item())


@dataclass(frozen=True)
class Indices(Grid):
    """A grid on the indices of a discrete chain."""

    def levels(self, process: Process, steps: int) -> Tensor:
        if not isinstance(process, DiscreteVP):
            name, kind = type(self).__name__.lower(), type(process).__name__
            raise UserError(f"the grid {name!r} needs a discrete process, got {kind}; try uniform")
        if not 1 <= steps <= process.levels:
            raise UserError(f"steps must be from 1 to {process.levels}, got {steps}")
        indices = torch.tensor(sorted(set(self.indices(process.levels, steps)), reverse=True), dtype=torch.float64)
        return process.level_of(indices)

    @abstractmethod
    def indices(self, total: int, steps: int) -> list[int]:
        """The indices kept, of `total`."""


class Respaced(Indices):
    """DiT's respacing "N": evenly, both ends kept."""

    def indices(self, total: int, steps: int) -> list[int]:
        return respaced(total, str(steps))


class DDIM(Indices):
    """DiT's respacing "ddimN": an integer stride from 0; refused where none gives exactly N."""

    def indices(self, total: int, steps: int) -> list[int]:
        return respaced(total, f"ddim{steps}")


@dataclass(frozen=True)
class Leading(Indices):
    """Stride total // steps from 0, moved up by `offset` (diffusers)."""

    offset: int = 0

    def indices(self, total: int, steps: int) -> list[int]:
        return [i * (total // steps) + self.offset for i in range(steps)]


class Trailing(Indices):
    """Stride total / steps down from the last index (Lin et al. 2024)."""

    def indices(self, total: int, steps: int) -> list[int]:
        return [round(total - i * total / steps) - 1 for i in range(steps)]


class Linspace(Indices):
    """Evenly over all indices, both ends kept (diffusers)."""

    def indices(self, total: int, steps: int) -> list[int]:
        return torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long().tolist()


GRIDS: dict[str, type[Grid]] = {
    "uniform": Uniform,
    "karras": Karras,
    "log-snr": LogSNR,
    "respaced": Respaced,
    "ddim": DDIM,
    "leading": Leading,
    "trailing": Trailing,
    "linspace": Linspace,
}


def grid(process: Process, steps: int, spacing: str | None = None, amount: float = 1.0) -> Tensor:
    """Noise levels [steps + 1] of a named spacing (None: the process's own), shifted, and 0 at the end."""
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    rule = named("spacing", GRIDS, spacing or process.spacing)
    levels = shift(rule.levels(process, steps), amount)
    return torch.cat([levels, levels.new_zeros(1)])


def respaced_grid(process: DiscreteVP, spec: str) -> Tensor:
    """The grid of one of DiT's respacing texts: "250", "ddim50", or sections such as "10,15,20"."""
    indices = torch.tensor(sorted(respaced(process.levels, spec), reverse=True), dtype=torch.float64)
    return torch.cat([process.level_of(indices), torch.zeros(1, dtype=torch.float64)])


def respaced(total: int, spec: str) -> list[int]:
    """The indices DiT keeps of `total`, ascending, for "N", "ddimN" or a comma list of section counts."""
    if spec.startswith("ddim"):
        wanted = int(spec.removeprefix("ddim"))
        kept = next((r for i in range(1, total) if len(r := range(0, total, i)) == wanted), None)
        if kept is None:
            raise UserError(f"no integer stride gives {wanted} of {total} steps; try the spacing respaced")
        return list(kept)
    counts = [int(count) for count in spec.split(",")]
    out, start = [], 0
    for number, count in enumerate(counts):
        size = total // len(counts) + (number < total % len(counts))
        if not 0 < count <= size:
            raise UserError(f"cannot keep {count} of a section of {size} steps")
        out += [start + i for i in _even(size, count)]
        start += size
    return out


def _even(size: int, count: int) -> list[int]:
    """`count` of `size` indices by adding up a float stride, as the original does (ties round to even)."""
    stride, position, out = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0, []
    for _ in range(count):
        out.append(round(position))
        position += stride
    return out
