"""Calibrations that methods of a comparison lack, made from one plain run before it, on other noise than its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ditloom.calibration import Circumstances, find, keep
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Calibrated
from ditloom.contracts.registries import METHODS
from ditloom.contracts.settings import registered
from ditloom.measure.calibrate import calibrate
from ditloom.measure.comparison.candidates import Candidate
from ditloom.measure.comparison.question import Question

if TYPE_CHECKING:
    from ditloom.model import Model

APART = 1_000_003
"""Added to the largest seed that is compared on: nothing is calibrated on the noise it is judged by."""


def calibrated(
    model: Model, wanted: Sequence[Candidate], question: Question, on_step: Callable[[], None] = lambda: None
) -> str | None:
    """Make and keep what is missing; a sentence on it, or None where nothing was."""
    now = Circumstances.of(model, model.latent_shape(question.settings.get("size")), question.settings)
    keys = sorted(set(_lacking(wanted, now)))
    if not keys:
        return None
    settings = {**question.settings, "seed": max(question.seeds) + APART}
    options: dict[str, Any] = {"batch_size": question.batch_size, "on_step": lambda pictures: on_step()}
    try:
        found = calibrate(model, question.inputs, settings, keys, **options)
        paths = {str(keep(assets, key, now).parent) for key, assets in found.assets.items()}
    except UserError as why:
        return f"Calibration of {', '.join(keys)} failed: {why}."
    count = len(question.inputs)
    return f"{', '.join(keys)} calibrated here on {count} pictures of other noise, kept in {', '.join(sorted(paths))}."


def _lacking(wanted: Sequence[Candidate], now: Circumstances) -> Iterator[str]:
    """The names of the methods that read a calibration and have none that fits."""
    for spec in (spec for candidate in wanted for spec in candidate.methods):
        try:
            method = registered(METHODS, spec)
        except UserError:
            continue
        if isinstance(method, Calibrated) and not method.calibration and _finds_none(method, now):
            yield type(method).__registration__.name  # type: ignore[attr-defined]


def _finds_none(method: Calibrated, now: Circumstances) -> bool:
    try:
        return find(method, now) is None
    except UserError:
        return True
