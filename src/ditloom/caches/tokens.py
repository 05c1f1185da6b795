"""Which tokens of a block are computed afresh: scores of their importance, their age, and how they are spread."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ditloom.contracts.layout import Layout
from ditloom.contracts.method import Tap


@dataclass(frozen=True)
class Look(Tap):
    """A capture that knows where the image stream lies.

    joint: its place in the joint sequence of all streams; image: the image segment's place in the stream; grid: its
    rows and columns of tokens, after any frames.
    """

    joint: tuple[int, int] = (0, 0)
    image: tuple[int, int] = (0, 0)
    grid: tuple[int, ...] = ()


def look(stage: str, block: int, layout: Layout, branch: str) -> Look:
    """A capture of a stage of one block, of one branch."""
    joint, image = layout.stream_slice("image"), layout.slice("image")
    places = (joint.start, joint.stop), (image.start, image.stop)
    return Look(stage, block, branches=(branch,), joint=places[0], image=places[1], grid=layout.grid)


class Score(ABC):
    """How much every token of the image stream matters [B, n], from what a stage gives where it is computed.

    every_branch: looked at in all branches, not only in the leading one.
    """

    stage: ClassVar[str]
    every_branch: ClassVar[bool] = False

    @abstractmethod
    def of(self, value: Tensor, at: Look) -> Tensor:
        """What of one branch counts [B, n]; of some tokens, where only these were computed."""

    def joined(self, found: Sequence[Tensor]) -> Tensor:
        """The score of every token, from what counts in each branch."""
        (value,) = found
        return F.normalize(value, dim=1)


class Attention(Score):
    """The attention that a token receives, averaged over heads and summed over queries (ToCa, s1).

    Among the tokens of the image stream. The logits are a product of their own, which fused attention does not give.
    """

    stage = "logits"

    def of(self, value: Tensor, at: Look) -> Tensor:
        among = slice(*at.joint)
        return value[:, :, among, among].float().softmax(-1).mean(1).sum(1)


class SmallValues(Score):
    """Tokens whose values are small, summed over heads: what DuCa takes where there is no attention map."""

    stage = "v_proj"

    def of(self, value: Tensor, at: Look) -> Tensor:
        return (1 - value.float().norm(dim=-1)).sum(-1)


class Text(Score):
    """The entropy of the attention that a token pays to the text, averaged over heads (ToCa, s2).

    Of a map that holds the texts of all branches side by side, each with its share, so that branches agree. A token
    that is computed alone on a cached step brings its map up to date.
    """

    stage = "cross_logits"
    every_branch = True

    def of(self, value: Tensor, at: Look) -> Tensor:
        paid = value.float().softmax(-1).mean(1)
        return -torch.sum(paid * torch.log(paid + 1e-7), dim=-1)

    def joined(self, found: Sequence[Tensor]) -> Tensor:
        entropy = math.log(len(found)) + torch.stack(tuple(found)).mean(0)
        return F.normalize(1 + entropy, dim=1)


SCORES: Mapping[str, type[Score] | None] = {
    "attention": Attention,
    "text": Text,
    "small-values": SmallValues,
    "age": None,
}
"""By name; with "age" all tokens matter alike, and how long ago they were computed decides."""


def spread(score: Tensor, at: Look, bonus: float, side: int = 2) -> Tensor:
    """The score [B, n] with the best token of every window raised by `bonus` times itself (ToCa, s4)."""
    if len(at.grid) < 2:
        return score
    start, stop = at.image
    image = score[:, start:stop].reshape(-1, 1, *at.grid[-2:])
    best, index = F.max_pool2d(image, side, ceil_mode=True, return_indices=True)
    raised = image.flatten(1).scatter_add(1, index.flatten(1), bonus * best.flatten(1))
    return torch.cat([score[:, :start], raised.reshape(len(score), -1), score[:, stop:]], dim=1)
