"""A family as the shared tests see it: tiny configurations, pinned parameter counts, and which questions it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

LATENT = {"depth": 3, "width": 64, "heads": 4, "patch": 2, "image_size": 8, "channels": 4}
ODD_HEAD = {**LATENT, "width": 96}  # heads of 24 features: an uneven split between two rotary axes shows
TEXT = {"text_width": 32, "text_tokens": 6}


@dataclass(frozen=True, kw_only=True)
class Portrait:
    """tiny: configurations by name, each beginning with the family's. counts: learned parameters of every preset.

    counted: presets whose MACs are compared with what runs. zero_start: a fresh network predicts exactly 0;
    identity_start: its fresh blocks change nothing. token_times: a time per image token is heard where it is.
    other_size: a latent size besides the native one, None where the family is built for one. turns: it tells rows from
    columns. restless: configurations whose fresh blocks do change something, in a family where others' do not; nonzero:
    those whose fresh network predicts something.
    dead: per configuration, parameters that no gradient reaches, as published; unread: those of them whose output
    nothing reads at all (a data-parallel wrapper must look for them). outputs: channels of the prediction, None for
    those of x.
    """

    tiny: Mapping[str, Any]
    counts: Mapping[str, int]
    counted: tuple[str, ...] = ()
    zero_start: bool = True
    identity_start: bool = True
    token_times: bool = True
    other_size: tuple[int, ...] | None = (12, 8)
    turns: bool = True
    restless: frozenset[str] = frozenset()
    nonzero: frozenset[str] = frozenset()
    dead: Mapping[str, frozenset[str]] = field(default_factory=dict)
    unread: Mapping[str, frozenset[str]] = field(default_factory=dict)
    outputs: Mapping[str, int] = field(default_factory=dict)


def portraits() -> dict[str, Portrait]:
    """Every family's portrait by file name."""
    files = sorted((Path(__file__).parent / "families").glob("[!_]*.py"))
    return {f.stem.replace("_", "-"): import_module(f"tests.backbones.families.{f.stem}").PORTRAIT for f in files}


PORTRAITS = portraits()
