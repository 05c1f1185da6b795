"""The price of a computed sub-module in the loss of routers, fixed or found for a share of the MACs (ours)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ditloom.caches.routers import Gates, computed, share_of, threshold_of

MEMORY = 0.1
"""Weight of the newest measurement in the running mean of what computing a sub-module is worth."""


class Price:
    """Adds the gradient of penalty * sum(scores) to that of the error, and notes what each sub-module is worth.

    target: the share of all sub-modules' MACs to be computed, for which the penalty is looked for; 0 keeps the given
    one. The error is about c (1 - score)^2, so that a score settles below the threshold where the penalty exceeds
    2 c (1 - threshold): that is what computing it is worth, and the penalty is the quantile at the target.
    """

    def __init__(self, gates: Gates, costs: Tensor, penalty: float, target: float, threshold: float):
        self.gates, self.costs, self.penalty = gates, costs, penalty
        self.target, self.threshold = target, threshold
        self.worth = torch.full((len(gates.logits), len(costs)), torch.inf)

    @torch.no_grad()
    def charge(self, step: int) -> None:
        """Between the backward pass of the error of a step and the optimiser's."""
        row = self.gates.logits[step]
        assert row.grad is not None
        score = row.sigmoid()
        slope = score * (1 - score)
        worth = -row.grad / slope / (1 - score) * (1 - self.threshold)
        known = self.worth[step].isfinite()
        self.worth[step] = torch.where(known, self.worth[step].lerp(worth, MEMORY), worth)
        row.grad.add_(slope, alpha=self.penalty)

    def settle(self) -> None:
        """Where a share is wanted, set the penalty to what the last sub-module within it is worth, once known."""
        found = threshold_of(self.worth, self.target, self.costs) if self.target else torch.inf
        if math.isfinite(found):
            self.penalty = max(found, 0.0)

    def share(self) -> float:
        """The share of all sub-modules' MACs that the scores compute now."""
        return share_of(computed(self.gates.scores.detach(), self.threshold), self.costs)
