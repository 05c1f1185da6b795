"""Does the drawn picture look like what was asked for? Its rank among all real pictures, and its nearest one's group.

With no image-text network at hand, the real picture of the same caption stands for the caption: all real pictures are
ordered by cosine similarity of features to the drawn one, and the rank of the right one is read off (1 is best).

What people reach: the 163 held-out emoji as drawn by Noto and by Twemoji, sought among the 1,599 of Fluent with
effnet-lite0, have median ranks 3 and 5, are first in 39 % and 34 %, within ten in 69 % and 60 %, and their nearest has
the right group in 79 % and 70 %. With 16x16 pixels in its place: median 23 and 27, right group 52 % and 50 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register
from ditloom.measure.evidence import Case, Evidence, Reading


def similarity(queries: Tensor, gallery: Tensor) -> Tensor:
    """Cosine similarity [N, M] of features [N, d] and [M, d], float64."""
    return normalize(queries.double(), dim=1) @ normalize(gallery.double(), dim=1).T


def ranks(similarities: Tensor, own: Tensor) -> Tensor:
    """Rank of column `own` [N] in each row of [N, M], 1 to M; equal values share the mean of their ranks."""
    mine = similarities.gather(1, own[:, None])
    above = (similarities > mine).sum(1)
    level = (similarities == mine).sum(1) - 1
    return 1 + above + level / 2


def nearest(similarities: Tensor) -> Tensor:
    """Column of the most similar one, [N]."""
    return similarities.argmax(1)


def places(cases: Sequence[Case], gallery: Sequence[Case]) -> Tensor:
    """Where each case's real picture stands in the gallery, by name."""
    by_name = {case.name: place for place, case in enumerate(gallery)}
    missing = [case.name for case in cases if case.name not in by_name]
    if missing:
        raise UserError(f"no real picture is named {missing[0]!r} ({len(missing)} of {len(cases)} cases have none)")
    return torch.tensor([by_name[case.name] for case in cases], dtype=torch.int64)


@register("retrieval")
@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Median and mean rank of the right real picture, the share within `top`, and the share of right groups.

    The gallery is all real pictures, training and held-out. The facts say what drawing at random would give.
    """

    top: tuple[int, ...] = (1, 10, 50)

    def __call__(self, evidence: Evidence) -> list[Reading]:
        gallery = evidence.training.cases + evidence.held_out.cases
        features = torch.cat([evidence.training_features, evidence.held_out_features])
        similarities = similarity(evidence.drawn_features, features)
        found = ranks(similarities, places(evidence.cases, gallery))
        right = [
            gallery[place].group == case.group
            for place, case in zip(nearest(similarities).tolist(), evidence.cases, strict=True)
        ]
        return [*self._rank_readings(found, len(gallery)), group_reading(right, evidence.cases, gallery)]

    def _rank_readings(self, found: Tensor, gallery: int) -> list[Reading]:
        facts = {"gallery": gallery}
        rank = found.double()
        readings = [
            Reading("retrieval/median-rank", float(rank.quantile(0.5)), None, {**facts, "chance": (gallery + 1) / 2}),
            Reading("retrieval/mean-rank", float(rank.mean()), _error(rank), {**facts, "chance": (gallery + 1) / 2}),
        ]
        for top in self.top:
            within = (rank <= top).double()
            chance = round(min(1.0, top / gallery), 6)
            readings.append(
                Reading(f"retrieval/top-{top}", float(within.mean()), _error(within), {**facts, "chance": chance})
            )
        return readings


def group_reading(right: Sequence[bool], cases: Sequence[Case], gallery: Sequence[Case]) -> Reading:
    """Share of `right`; by chance a real picture taken at random has the group asked for."""
    groups = [case.group for case in gallery]
    chance = sum(groups.count(case.group) / len(groups) for case in cases) / len(cases)
    share = torch.tensor(right, dtype=torch.float64)
    facts = {"gallery": len(groups), "chance": round(chance, 4)}
    return Reading("retrieval/right-group", float(share.mean()), _error(share), facts)


def _error(values: Tensor) -> float | None:
    """Standard error of the mean."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
