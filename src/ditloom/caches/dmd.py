"""Dynamic mode decomposition as a forecast: a stored value moves like a sum of damped and turning exponentials.

Prony's method in many dimensions (Schmid 2010), as a forecast of what a cache stores in vipshop/cache-dit; no paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.sites.codecs import zip_map

LEAST = 4
"""Values that it takes to tell one oscillation."""
CUT = 1e-4
RIDGE = 1e-8


@dataclass(frozen=True)
class DynamicModes:
    """The newest values at equal distances are fitted by ``z_{k+1} = A z_k``; A is followed on, for each row apart.

    history: how many computed values are kept. rank: modes of A; 0 takes those above 1e-4 of the strongest. With fewer
    than four values at equal distances it is a straight line through the last two. Where the fit fails, the newest
    value. A forecast is a weighted sum of what is stored, its weights found from the values' products.
    """

    history: int = 6
    rank: int = 0
    least: int = 1

    def __post_init__(self) -> None:
        if not LEAST <= self.history <= 16 or self.rank < 0:
            given = f"history={self.history},rank={self.rank}"
            raise UserError(f"dmd keeps {LEAST} to 16 values and takes a rank of at least 0; got {given}")

    @property
    def depth(self) -> int:
        """Values kept."""
        return self.history

    def __call__(self, history: Sequence[tuple[int, Any]], step: int) -> Any:
        tail = evenly_spaced(history)
        if len(tail) < LEAST:
            return zip_map(lambda *z: _line(z, [s for s, _ in tail], step), *(z for _, z in tail))
        ahead = (step - tail[-1][0]) / (tail[-1][0] - tail[-2][0])
        return zip_map(lambda *z: self._forecast(z, ahead), *(z for _, z in tail))

    def _forecast(self, values: Sequence[Tensor], ahead: float) -> Tensor:
        exact = torch.promote_types(values[-1].dtype, torch.float32)
        flat = [z.flatten(1).to(exact) for z in values]
        grams = products(flat).cpu()
        if not bool(grams.isfinite().all()):
            return values[-1]
        weights = [mode_weights(gram, ahead, self.rank) for gram in grams]
        by_row = torch.stack(weights).to(flat[0])
        terms = [w[:, None] * z for w, z in zip(by_row.unbind(1), flat, strict=True)]
        return sum(terms[1:], terms[0]).view_as(values[-1]).to(values[-1].dtype)


def evenly_spaced(history: Sequence[tuple[int, Any]]) -> Sequence[tuple[int, Any]]:
    """The longest end of a history whose steps are equally far apart."""
    steps = [s for s, _ in history]
    first = max(len(steps) - 2, 0)
    while first and steps[first] - steps[first - 1] == steps[-1] - steps[-2]:
        first -= 1
    return history[first:]


def products(values: Sequence[Tensor]) -> Tensor:
    """All inner products of values [B, d] of each row, in float64: [B, n, n]."""
    stacked = torch.stack(tuple(values), dim=1).double()
    return stacked @ stacked.mT


def mode_weights(gram: Tensor, ahead: float, rank: int = 0) -> Tensor:
    """How much of each value [n] is in the forecast `ahead` distances on; the newest alone where nothing can be fitted.

    With X the values but the last and Y all but the first, ``X = U S V^T`` and ``A = U^T Y V / S`` in the space of the
    strongest directions; its eigenvectors W give the modes ``Y V / S W``, into which the newest value is decomposed.
    """
    newest = torch.zeros(len(gram), dtype=torch.float64)
    newest[-1] = 1.0
    squares, vectors = torch.linalg.eigh(gram[:-1, :-1])
    strength = squares.clamp_min(0).sqrt()
    kept = strength > CUT * strength[-1]
    chosen = kept.nonzero()[-rank:, 0] if rank else kept.nonzero()[:, 0]
    if not len(chosen):
        return newest
    v, s = vectors[:, chosen], strength[chosen]
    through = (v / (s + RIDGE)).to(torch.complex128)
    inner = (v / s).T @ gram[:-1, 1:]
    moved = inner.to(torch.complex128) @ through
    powers, w = torch.linalg.eig(moved)
    modes = through @ w
    among, onto = gram[1:, 1:].to(torch.complex128), gram[1:, -1].to(torch.complex128)
    share = torch.linalg.lstsq(modes.mH @ among @ modes, modes.mH @ onto[:, None]).solution[:, 0]
    found = (modes @ (powers.pow(ahead) * share)).real
    return torch.cat([torch.zeros(1, dtype=torch.float64), found]) if bool(found.isfinite().all()) else newest


def _line(values: Sequence[Tensor], steps: Sequence[int], step: int) -> Tensor:
    if len(values) < 2:
        return values[-1]
    before, newest = values[-2:]
    exact = torch.promote_types(newest.dtype, torch.float32)
    ahead = (step - steps[-1]) / (steps[-1] - steps[-2])
    return torch.lerp(before.to(exact), newest.to(exact), 1 + ahead).to(newest.dtype)
