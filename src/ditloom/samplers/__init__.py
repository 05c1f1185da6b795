"""Solvers as generators over steps, in both directions, and guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ditloom.contracts.registries import GUIDANCE, SAMPLERS

if TYPE_CHECKING:
    from ditloom.contracts.sampler import Guidance, Sampler


def sampler(spec: str | Mapping[str, Any] | Sampler) -> Sampler:
    """A sampler from "ddim:eta=1", from a mapping with a "name", or as it is."""
    from ditloom.contracts.settings import registered

    return registered(SAMPLERS, spec)


def guidance_rule(spec: str | Mapping[str, Any] | Guidance) -> Guidance:
    """A guidance rule from "cfg:scale=4", from a mapping with a "name", or as it is."""
    from ditloom.contracts.settings import registered

    return registered(GUIDANCE, spec)
