"""A small alignment objective: captures a block's output and owns a head, as REPA does."""

import torch
from torch import nn

from ditloom.contracts.method import Tap
from ditloom.contracts.objective import Objective


class Align(Objective):
    """Squared distance of a projection of block 0's tokens to a fixed function of the clean latents."""

    def __init__(self, width: int = 32, until: int = 10**9, weight: float = 0.5):
        super().__init__()
        torch.manual_seed(5)
        self.head = nn.Linear(width, 16)
        self.until, self.weight, self.runs = until, weight, 0
        self.tap = Tap("block_out", block=0, gradient=True)

    def captures(self):
        return (self.tap, Tap("logits", block=1, gradient=True))

    def coefficient(self, images_seen):
        return self.weight if images_seen < self.until else 0.0

    def forward(self, batch, prediction, captured):
        self.runs += 1
        tokens, logits = captured[self.tap], captured[self.captures()[1]]
        target = batch.x.unflatten(2, (4, 2)).unflatten(4, (4, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        distance = (self.head(tokens).float() - target).square().mean((1, 2))
        return distance + 0.01 * logits.float().square().mean((1, 2, 3)), {"distance": distance}
