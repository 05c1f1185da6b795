"""The columns of a comparison's table: where each value comes from, how it is written, and what it means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditloom.measure.comparison.row import Row
from ditloom.measure.comparison.scores import EQUAL, MEANINGS

if TYPE_CHECKING:
    from ditloom.measure.comparison.answer import Comparison

Value = Callable[["Comparison", Row], float | None]


@dataclass(frozen=True)
class Column:
    """One column. axis: where it may be plotted. scale: what a value is multiplied by before it is written. equal: the
    value of pictures that do not differ."""

    key: str
    title: str
    meaning: str
    value: Value
    form: str = "{:.2f}"
    unit: str = ""
    higher: bool = True
    axis: str = ""
    scale: float = 1.0
    equal: float | None = None

    def shown(self, value: float | None) -> str:
        """As people read it."""
        if value is None:
            return ""
        if value == self.equal:
            return "equal"
        text = self.form.format(value * self.scale)
        return (text if text.strip("+-0.") else text.lstrip("-")) + self.unit


def _score(metric: str) -> Value:
    return lambda found, row: row.value(metric)


def _measured(take: Callable[[Row], float | None]) -> Value:
    return lambda found, row: take(row)


def _margin(found: Comparison, row: Row) -> float | None:
    return found.margin(row)


COLUMNS = (
    Column("name", "Set", "the methods that run together", lambda found, row: None),
    Column(
        "speedup",
        "Speed-up",
        "how many times as fast as the plain run, by wall time measured in turns with it",
        _measured(lambda row: row.speedup),
        unit="x",
        axis="x",
    ),
    Column("psnr", "PSNR", MEANINGS["psnr"], _score("psnr"), form="{:.1f}", unit=" dB", axis="y", equal=EQUAL),
    Column(
        "margin",
        "vs fewer steps",
        "PSNR above that of a plain run with as few steps as take the same multiply-accumulates, rounded up to a step",
        _margin,
        form="{:+.1f}",
        unit=" dB",
    ),
    Column("ssim", "SSIM", MEANINGS["ssim"], _score("ssim"), form="{:.3f}", axis="y"),
    Column("lpips", "LPIPS", MEANINGS["lpips"], _score("lpips"), form="{:.3f}", higher=False, axis="y"),
    Column(
        "accuracy", "Accuracy", MEANINGS["accuracy"], _score("accuracy"), form="{:.0f}", unit=" %", axis="y", scale=100
    ),
    Column("frechet", "Fréchet", MEANINGS["frechet"], _score("frechet"), form="{:.1f}", higher=False, axis="y"),
    Column(
        "share_saved",
        "MACs saved",
        "share of the plain run's multiply-accumulates that was not executed, probes included",
        _measured(lambda row: row.share_saved),
        form="{:.0f}",
        unit=" %",
        axis="x",
        scale=100,
    ),
    Column(
        "share_reused",
        "Reused",
        "share of the map of steps, blocks and guidance branches that was reused, predicted or left out",
        _measured(lambda row: row.share_reused),
        form="{:.0f}",
        unit=" %",
        scale=100,
    ),
    Column(
        "seconds",
        "Time",
        "wall time of one picture, from input to decoded picture",
        _measured(lambda row: row.seconds),
        form="{:.0f}",
        unit=" ms",
        higher=False,
        axis="x",
        scale=1000,
    ),
    Column(
        "macs",
        "MACs",
        "multiply-accumulates of one picture",
        _measured(lambda row: float(row.macs)),
        form="{:.3g}",
        unit=" G",
        higher=False,
        scale=1e-9,
    ),
    Column(
        "held_bytes",
        "Cache",
        "the most bytes that the methods kept between steps",
        _measured(lambda row: float(row.held_bytes)),
        form="{:.2f}",
        unit=" MB",
        higher=False,
        scale=1e-6,
    ),
    Column(
        "peak_bytes",
        "Peak",
        "the most memory of the whole process (of the device, on an accelerator) while the set ran",
        _measured(lambda row: None if row.peak_bytes is None else float(row.peak_bytes)),
        form="{:.0f}",
        unit=" MB",
        higher=False,
        scale=1e-6,
    ),
)

LEGEND = (
    *((column.title, f"{column.meaning[0].upper()}{column.meaning[1:]}.") for column in COLUMNS[1:]),
    (
        "Plain run",
        "The model with nothing attached. A cache is good when its pictures of equal seeds stay close to these; "
        "closeness is not beauty, and a set that drifts may still draw well.",
    ),
    (
        "Fewer steps",
        "The control: no method at all, the sampler simply takes fewer steps. A cache earns its place only where it "
        "stays closer to the plain run than this does for the same arithmetic.",
    ),
    (
        "Front",
        "The sets that no other one beats in both speed and closeness. Everything below the line is beaten by "
        "something on it.",
    ),
)


def filled(found: Comparison) -> list[Column]:
    """The columns in which at least one row has a value."""
    there = [row for row in found.rows if row.refused is None]
    return [c for c in COLUMNS if c.key == "name" or any(c.value(found, row) is not None for row in there)]


def empty_because(found: Comparison) -> list[str]:
    """For every column that nothing could be written into, why."""
    reasons: dict[str, list[str]] = {}
    for column in COLUMNS:
        absent = [row.absent[column.key] for row in found.rows if column.key in row.absent]
        if absent:
            reasons.setdefault(absent[0], []).append(column.title)
    return [f"{', '.join(titles)}: {reason}." for reason, titles in reasons.items()]
