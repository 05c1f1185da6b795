"""The report of a run: one HTML file with nothing outside it, made from what lies in the run folder."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditloom.training.chart import Chart, smoothed
from ditloom.training.durable import explained, replace_file
from ditloom.training.metrics import read_metrics, series
from ditloom.training.progress import duration

PICTURES = 12
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; } .sub { color: #718096; }
table { border-collapse: collapse; } td { padding: 2px 1rem 2px 0; vertical-align: top; }
td:first-child { color: #718096; } pre { background: #f7fafc; padding: 1rem; overflow: auto; font-size: 13px; }
figure { display: inline-block; margin: 0 1rem 1rem 0; } figcaption { color: #718096; font-size: 13px; }
img { max-width: 100%; image-rendering: pixelated; min-width: 10rem; } svg { max-width: 100%; height: auto; }
.title { font: 600 13px system-ui, sans-serif; fill: #1a202c; } .tick { font: 11px system-ui, sans-serif; }
.grid { stroke: #e2e8f0; } .line { fill: none; stroke-width: 1.6; }
"""


def write_report(run: Path, title: str, facts: Mapping[str, Any] | None = None) -> Path:
    """Write `report.html` into the run folder: facts, loss curves, sample grids over time, and the recipe."""
    path = run / "report.html"
    records = read_metrics(run / "metrics.jsonl")
    told = {**summary(records), **(facts or {})}
    body = [f"<h1>{html.escape(title)}</h1>", '<p class="sub">a ditloom training run</p>', table(told)]
    body += [chart.svg() for chart in charts(records)]
    body.append(pictures(run / "samples"))
    recipe = run / "recipe.yaml"
    if recipe.is_file():
        body.append(f"<h2>Recipe</h2><pre>{html.escape(recipe.read_text(encoding='utf-8'))}</pre>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    page = f"<!doctype html><html><head>{head}</head><body>{''.join(body)}</body></html>"
    with explained("write", path):
        replace_file(path, [page.encode()])
    return path


def summary(records: list[dict[str, Any]]) -> dict[str, str]:
    """What the metrics say in a few words."""
    if not records:
        return {"images seen": "0"}
    told = {"images seen": f"{records[-1]['images']:,}"}
    seconds = records[-1].get("seconds")
    if seconds:
        told["time of training"] = duration(seconds)
        told["speed"] = f"{records[-1]['images'] / seconds:.3g} images a second"
    _, losses = series(records, "loss")
    if losses:
        last = losses[-max(1, len(losses) // 20) :]
        told["loss"] = f"{sum(last) / len(last):.4f} (mean of the last twentieth)"
    return told


def charts(records: list[dict[str, Any]]) -> list[Chart]:
    """The curves that were logged."""
    found = []
    for name, title in (("loss", "Training loss"), ("gradient", "Gradient norm"), ("rate", "Learning rate")):
        xs, ys = series(records, name)
        if len(xs) > 1:
            lines = {"as logged": (xs, ys)} | ({"smoothed": (xs, smoothed(ys))} if name != "rate" else {})
            found.append(Chart(title=title, lines=lines))
    return found


def pictures(folder: Path) -> str:
    """Sample grids inline, the last one first and large, then some of the earlier ones in order of time."""
    paths = sorted(folder.glob("images-*.png")) if folder.is_dir() else []
    if not paths:
        return ""
    stride = -(-len(paths) // PICTURES)
    chosen = [paths[-1], *paths[:-1][::stride]]
    return "<h2>Samples</h2>" + "".join(figure(path) for path in chosen)


def figure(path: Path) -> str:
    """One picture and the image count it was drawn at."""
    images = int(path.stem.removeprefix("images-"))
    data = base64.b64encode(path.read_bytes()).decode()
    source = f'<img alt="samples at {images} images" src="data:image/png;base64,{data}">'
    return f"<figure>{source}<figcaption>{images:,} images</figcaption></figure>"


def table(facts: Mapping[str, Any]) -> str:
    """Facts as a table."""
    rows = (f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<table>{''.join(rows)}</table>"
