"""HarmoniCa: Harmonizing Training and Inference for Better Feature Cache in Diffusion Transformer Acceleration
(Huang et al., ICML 2025, arXiv 2410.01723). Its routers are trained by `ditloom.distillation.harmonica`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ditloom.caches.routers import Routed
from ditloom.contracts.registry import register


@register(
    "harmonica",
    paper="HarmoniCa: Harmonizing Training and Inference for Better Feature Cache, arXiv 2410.01723",
    family="caches",
    plain="Reuses attentions and feed-forwards by a timetable that was learned on whole runs of this model.",
)
@dataclass(frozen=True, kw_only=True)
class HarmoniCa(Routed):
    """Every attention and feed-forward is computed or reused, however old, as routers trained on whole runs decided.

    The routers belong to one model, sampler, step count and guidance. They are trained without images; see
    `ditloom calibrate --train harmonica`.
    """
