"""The study's page and its curves, from the results of its runs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
Result = dict[str, Any]


def write_report(results: Sequence[Result], macs: int, images: int) -> None:
    """docs/family-study.md with the table, and docs/images/family-study.svg with the curves."""
    rows = sorted(summarised(results), key=lambda row: row["loss"])
    page = "\n".join([*introduction(results, macs, images), *table(rows), "", *verdict(rows)])
    (DOCS / "family-study.md").write_text(page + "\n", encoding="utf-8")
    plot(results, rows, DOCS / "images" / "family-study.svg")


def summarised(results: Sequence[Result]) -> Iterator[Result]:
    """One row per family: the mean and deviation over the seeds of its best learning rate."""
    by_family = defaultdict(lambda: defaultdict(list))
    for r in results:
        by_family[r["family"]][r["rate"]].append(r)
    for family, rates in by_family.items():
        firsts = {rate: next((r for r in rs if r["seed"] == 0), rs[0]) for rate, rs in rates.items()}
        best = min(firsts, key=lambda rate: _or_infinite(firsts[rate]["held_out_loss"]))
        chosen = rates[best]
        row = {"family": family, "rate": best, "tried": sorted(rates), "seeds": len(chosen), "macs": chosen[0]["macs"]}
        row |= {"parameters": chosen[0]["parameters"], "speed": max(r["images_per_second"] for r in chosen)}
        for name, key in (("loss", "held_out_loss"), ("frechet", "frechet")):
            values = [r[key] for r in chosen]
            row |= {name: mean(values), f"{name}_sd": stdev(values) if len(values) > 1 else math.nan}
        yield row


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def introduction(results: Sequence[Result], macs: int, images: int) -> list[str]:
    """What was done."""
    return [
        "# Every family at equal cost, small",
        "",
        "Written by `python -m recipes.family_study report`; the runs are those of its `rates` and `seeds`.",
        "",
        f"Fashion-MNIST at 32x32, folded 4x4 into 16 channels of 8x8; {len(results)} runs of {images:,} images each",
        "(batch 64, linear flow, AdamW, cosine, bf16, average 0.995), every family at the width whose forward takes",
        f"closest to {macs / 1e6:g} MMACs. Learning rates 0.008, 0.016 and 0.032; where the best of a family was the",
        "lowest or highest, the next by a factor of two as well, from 0.001 to 0.032. Three seeds for DiT, for all",
        "that did better, and for all that two deviations of the difference do not separate from the best. Loss:",
        "velocity error on 1,000 held-out pictures with fixed noise at evenly spread levels. Frechet: distance in the",
        "features of the bundled classifier of 500 pictures (Heun, 10 steps, no guidance) to 1,000 held-out ones,",
        "biased upwards by its small N, for all alike. Deviations are over seeds. img/s: the best of a family's runs,",
        "on one core shared with other work: rough.",
        "",
        "![loss curves](images/family-study.svg)",
        "",
    ]


def table(rows: Sequence[Result]) -> Iterator[str]:
    """All families, best loss first."""
    yield "| family | held-out loss | Frechet | best rate | seeds | MMACs | parameters | training img/s |"
    yield "|---|---|---|---|---|---|---|---|"
    for r in rows:
        loss, frechet = _bar(r["loss"], r["loss_sd"], 4), _bar(r["frechet"], r["frechet_sd"], 1)
        cost = f"{r['macs'] / 1e6:.1f} | {r['parameters'] / 1e6:.2f} M | {r['speed']:.0f}"
        yield f"| `{r['family']}` | {loss} | {frechet} | {r['rate']:g} | {r['seeds']} | {cost} |"


def _bar(value: float, deviation: float, digits: int) -> str:
    return f"{value:.{digits}f}" + (f" +- {deviation:.{digits}f}" if math.isfinite(deviation) else "")


def verdict(rows: Sequence[Result]) -> list[str]:
    """Which families the bars do not separate from the best, and from DiT."""
    sure = [r for r in rows if math.isfinite(r["loss_sd"])]
    if not sure:
        return ["One seed each: nothing can be ranked."]
    lines = ["Families whose loss is within two deviations (of the difference) of the best:"]
    lines.append(", ".join(f"`{r['family']}`" for r in sure if not separated(sure[0], r)) + ".")
    plain = next((r for r in sure if r["family"] == "dit"), None)
    if plain is not None:
        better = [r["family"] for r in sure if separated(r, plain) and r["loss"] < plain["loss"]]
        worse = [r["family"] for r in sure if separated(r, plain) and r["loss"] > plain["loss"]]
        lines += ["", f"Better than `dit` beyond two deviations: {_named(better)}. Worse: {_named(worse)}."]
    return lines


def separated(a: Result, b: Result) -> bool:
    """Whether two mean losses differ by more than two deviations of their difference."""
    return abs(a["loss"] - b["loss"]) > 2 * math.hypot(a["loss_sd"], b["loss_sd"])


def _named(families: Sequence[str]) -> str:
    return ", ".join(f"`{f}`" for f in families) or "none"


def plot(results: Sequence[Result], rows: Sequence[Result], path: Path) -> None:
    """Training loss of every family's best rate, all seeds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ditloom"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    colours = pyplot.get_cmap("tab20")
    for number, row in enumerate(rows):
        for r in results:
            if (r["family"], r["rate"]) == (row["family"], row["rate"]):
                label = row["family"] if r["seed"] == 0 else None
                style = "-" if number < 20 else "--"
                axes.plot(*zip(*r["curve"], strict=True), style, color=colours(number % 20), lw=0.9, label=label)
    axes.set(xlabel="images", ylabel="training loss", yscale="log")
    axes.legend(fontsize=7, ncol=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
