"""Evaluation of a model: draw stated samples, hold them against real pictures, state every number's protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditloom.contracts.metric import Measurement, Protocol
from ditloom.contracts.settings import registered
from ditloom.measure import METRICS
from ditloom.measure.drawing import Sampling, draw, model_hash
from ditloom.measure.evidence import Case, Evidence, Metric, Real
from ditloom.measure.features import Extractor, built
from ditloom.training.durable import explained, json_bytes, replace_file

if TYPE_CHECKING:
    from ditloom.model import Model


@dataclass(frozen=True)
class Evaluation:
    """The measurements, and the evidence they were taken from (to look at, and to measure more)."""

    measurements: list[Measurement]
    evidence: Evidence

    def value(self, metric: str) -> float:
        """The value of the one measurement of that name."""
        return next(m.value for m in self.measurements if m.protocol.metric == metric)

    def save(self, path: Path) -> None:
        """All measurements as JSON, in their order."""
        save_measurements(self.measurements, path)


def evaluate(
    model: Model,
    cases: Sequence[Case],
    training: Real,
    held_out: Real,
    *,
    metrics: Sequence[str | Metric] = ("frechet", "kernel-distance", "memorisation"),
    extractor: str | Extractor = "effnet-lite0",
    sampling: Sampling | None = None,
    folder: Path | None = None,
    cache: Path | None = None,
    on_drawn: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Draw one picture a case, image i from (seed, i), and measure.

    metrics and extractor: registered names with settings ("kernel-distance:subset_size=500"), or objects.  folder:
    where drawn pictures are kept and an interrupted evaluation goes on.  cache: where features of real pictures are
    kept.
    """
    sampling = sampling or Sampling()
    chosen = [registered(METRICS, metric) for metric in metrics]
    seen_with = built(extractor)
    drawn = draw(model, [case.input for case in cases], sampling, folder, on_drawn)
    evidence = Evidence(drawn, tuple(cases), training, held_out, seen_with, cache)
    return Evaluation(measure(evidence, chosen, protocol(model, sampling, evidence)), evidence)


def protocol(model: Model, sampling: Sampling, evidence: Evidence) -> Protocol:
    """What all measurements of one evaluation share."""
    settings = sampling.resolved(model)
    extra: dict[str, Any] = {"data": [evidence.training.fingerprint(), evidence.held_out.fingerprint()]}
    extra |= {name: settings[name] for name in ("size", "using") if settings.get(name)}
    return Protocol(
        metric="",
        model=f"{model.info.get('name', 'model')} {model_hash(model)}",
        extractor=evidence.extractor.tag,
        samples=len(evidence.drawn),
        sampler=str(settings["sampler"]),
        steps=int(settings["steps"]),
        guidance=str(settings["guidance"]),
        seeds=f"{settings['seed']}, images 0 to {len(evidence.drawn) - 1}",
        extra=extra,
    )


def measure(evidence: Evidence, metrics: Sequence[Metric], shared: Protocol) -> list[Measurement]:
    """Every reading of every metric under the shared protocol and its own facts."""
    readings = [reading for metric in metrics for reading in metric(evidence)]
    return [
        Measurement(r.value, _with(shared, metric=r.name, extra={**shared.extra, **r.facts}), r.error) for r in readings
    ]


def anchors(
    training: Real, held_out: Real, metrics: Sequence[Metric], extractor: Extractor, cache: Path | None = None
) -> list[Measurement]:
    """The same metrics with the held-out real pictures in place of drawn ones: what a perfect model would read."""
    evidence = Evidence(held_out.images, held_out.cases, training, held_out, extractor, cache)
    data = [training.fingerprint(), held_out.fingerprint()]
    shared = Protocol("", "real held-out pictures", extractor.tag, len(held_out.cases), extra={"data": data})
    return measure(evidence, metrics, shared)


def save_measurements(measurements: Sequence[Measurement], path: Path) -> None:
    """A JSON list; values that are not finite become null."""
    listed = [_plain(measurement.to_dict()) for measurement in measurements]
    with explained("write to", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [json_bytes(listed) + b"\n"])


def _with(shared: Protocol, **changes: Any) -> Protocol:
    return Protocol(**{**vars(shared), **changes})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
