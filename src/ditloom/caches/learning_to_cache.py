"""Learning-to-Cache: Accelerating Diffusion Transformer via Layer Caching (Ma et al., NeurIPS 2024, arXiv 2406.01733).

Its routers are trained by `ditloom.distillation.learning_to_cache`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ditloom.caches.routers import Routed
from ditloom.contracts.registry import register


@register(
    "learning-to-cache",
    paper="Learning-to-Cache: Accelerating Diffusion Transformer via Layer Caching, arXiv 2406.01733",
    family="caches",
    plain="Reuses attentions and feed-forwards of the step before by a timetable that was learned for this model.",
)
@dataclass(frozen=True, kw_only=True)
class LearningToCache(Routed):
    """Every second step reuses those attentions and feed-forwards of the step before that routers have chosen.

    At most half of the steps reuse anything, and nothing is older than one step. The routers belong to one model,
    sampler and step count, and are trained on pictures; see `ditloom calibrate --train learning-to-cache`.
    """
