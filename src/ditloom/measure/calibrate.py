"""Calibration: plain runs of a model, watched, and what each method that needs it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditloom.caches.trace import KINDS, Recorder, Trace
from ditloom.calibration import Circumstances
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets, Calibrated
from ditloom.contracts.registries import METHODS, TRAININGS
from ditloom.contracts.settings import registered

if TYPE_CHECKING:
    from ditloom.model import Input, Model

SITES = "sites"


@dataclass(frozen=True)
class Calibration:
    """What plain runs showed, under which circumstances, and the assets of each method."""

    trace: Trace
    circumstances: Circumstances
    assets: dict[str, Assets] = field(default_factory=dict)

    def advice(self) -> Iterator[tuple[str, str]]:
        """Methods as a user writes them, and what each would do."""
        for key, assets in self.assets.items():
            yield from METHODS.get(key).advice(self.trace, assets.tensors)

    def curves(self) -> dict[str, list[float]]:
        """By kind of site, the mean change of its outputs to the step before, for every step but the first."""
        found: dict[str, list[Tensor]] = {}
        for label, changes in self.trace.sites.items():
            found.setdefault(label.partition("(")[0], []).append(changes.nanmean(0)[1:])
        return {kind: torch.stack(found[kind]).mean(0).tolist() for kind in KINDS if kind in found}


def calibrated_methods() -> list[str]:
    """Every method that reads a calibration."""
    return [name for name in METHODS.names() if _reads(METHODS.get(name))]


def chosen(listed: str) -> list[str]:
    """Methods from names with commas between, or all that read a calibration."""
    keys = [name.strip() for name in listed.split(",") if name.strip()] or calibrated_methods()
    for key in keys:
        if key in TRAININGS.names():
            raise UserError(f"{key} is learned in a training, not seen in a plain run: ask for it with --train {key}")
        if not _reads(METHODS.get(key)):
            raise UserError(f"{key} reads no calibration; those that do are {', '.join(calibrated_methods())}")
    return keys


def calibrate(
    model: Model,
    inputs: Sequence[Input],
    settings: Mapping[str, Any],
    methods: Sequence[str],
    *,
    batch_size: int = 32,
    sites: bool = True,
    on_step: Callable[[int], None] = lambda pictures: None,
) -> Calibration:
    """Draw the inputs plainly, image i from (seed, i), and fit every method; `on_step(pictures)` after each step.

    sites: watch every attention and feed-forward too, for which their outputs of one step are held.
    """
    plain, traces = replace(model, attached=[]), []
    for start in range(0, len(inputs), batch_size):
        part = list(inputs[start : start + batch_size])
        recorder = Recorder(sites)
        batch = plain.batch(part, range(start, start + len(part)), settings, using=[recorder])
        for _ in batch.steps():
            on_step(len(part))
        traces.append(recorder.trace())
    trace = Trace.joined(traces)
    now = Circumstances.of(model, model.latent_shape(settings.get("size")), settings)
    return Calibration(trace, now, dict(_fitted(trace, now, methods, len(inputs))))


def taught(
    model: Model,
    inputs: Sequence[Input],
    settings: Mapping[str, Any],
    training: str | Any,
    note: Callable[[int, int, Mapping[str, float]], None] = lambda *_: None,
) -> tuple[str, Assets]:
    """The method and the assets of a training such as "harmonica:trajectories=60"; `note` follows its rounds."""
    from ditloom.distillation.setting import Setting

    chosen = registered(TRAININGS, training)
    registration = type(chosen).__registration__
    key = registration.facts.get("trains", registration.name)
    plain = replace(model, attached=[])
    tensors = chosen.train(Setting(plain, dict(settings), list(inputs)), note)
    now = Circumstances.of(model, model.latent_shape(settings.get("size")), settings)
    return key, Assets(tensors, {**now.facts(key), "training": str(chosen)})


def _fitted(trace: Trace, now: Circumstances, methods: Sequence[str], pictures: int) -> Iterator[tuple[str, Assets]]:
    for key in methods:
        yield key, fitted(key, trace, **{**now.facts(key), "pictures": pictures})


def fitted(key: str, trace: Trace, **made_for: Any) -> Assets:
    """What a method makes of a trace. Of a foreign pipeline, watched by a `Recorder`, only the steps are known."""
    tensors = METHODS.get(key).from_trace(trace)
    if not tensors:
        raise UserError(f"{key} learns nothing from {trace.steps} steps: calibrate with more")
    return Assets(tensors, {"method": key, "steps": trace.steps, **made_for})


def _reads(method: Any) -> bool:
    return isinstance(method, type) and issubclass(method, Calibrated)


def flat_part(curve: Sequence[float]) -> tuple[int, int]:
    """The longest run of steps [first, end) whose change stays below the curve's mean; steps count from 1."""
    mean = sum(curve) / max(len(curve), 1)
    best, start = (0, 0), 0
    for s in range(len(curve) + 1):
        if s == len(curve) or curve[s] > mean:
            best = max(best, (start, s), key=lambda run: run[1] - run[0])
            start = s + 1
    return best[0] + 1, best[1] + 1
