"""The page of a comparison: one HTML file that needs no network, with its data, pictures, style and script inside."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from ditloom.measure.comparison.candidates import Candidate, about
from ditloom.measure.comparison.columns import COLUMNS, LEGEND, Column, empty_because, filled
from ditloom.measure.comparison.question import in_words
from ditloom.measure.comparison.verdict import (
    TIERS,
    Advice,
    advice,
    choice_in_words,
    headline,
    looks,
    pace,
    reasons,
    unit,
)
from ditloom.measure.drawing import as_picture
from ditloom.training.durable import explained, replace_file

if TYPE_CHECKING:
    from ditloom.measure.comparison.answer import Comparison
    from ditloom.measure.comparison.row import Row
    from ditloom.measure.evidence import Pictures

ASSETS = Path(__file__).parents[2] / "assets" / "compare"
SHOWN = 12
"""Pictures of each set on the page, evenly spread over all."""


def save_page(found: Comparison, path: Path) -> None:
    """Write the page."""
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [page(found).encode("utf-8")])


def page(found: Comparison) -> str:
    """The whole document."""
    model, columns = found.protocol.model.rpartition(" ")[0], filled(found)
    parts = {
        "title": escape(f"ditloom: which cache for {model}?"),
        "model": escape(model),
        "summary": escape(_summary(found)),
        "style": _asset("page.css"),
        "script": _asset("page.js"),
        "answer": escape(headline(found)),
        "choice": _choice(choice_in_words(found)),
        "cards": "".join(_card(found, same) for same in _merged(advice(found))),
        "reasons": _items(reasons(found)),
        "head": "".join(_heading(column) for column in columns),
        "rows": "".join(_row(found, row, columns) for row in found.rows),
        "empty": _items(empty_because(found)),
        "legend": "".join(f"<div><dt>{escape(word)}</dt><dd>{escape(meaning)}</dd></div>" for word, meaning in LEGEND),
        "protocol": _items([*in_words(found.protocol), *found.remarks]),
        "hash": escape(found.protocol.hash),
        "data": _embedded(_data(found)),
    }
    return Template(_asset("page.html")).substitute(parts)


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _summary(found: Comparison) -> str:
    sets = [row for row in found.rows[1:] if not row.control]
    controls = len(found.rows) - 1 - len(sets)
    said = found.protocol
    return (
        f"{len(sets)} sets of methods and {controls} runs of fewer steps, each against the plain run of {said.steps} "
        f"{said.sampler} steps: {said.samples} pictures, measured on {said.extra['machine']}."
    )


def _data(found: Comparison) -> dict[str, Any]:
    """What the script draws from."""
    shown = np.unique(np.linspace(0, found.question.pictures - 1, min(SHOWN, found.question.pictures)).round())
    places = [int(place) for place in shown]
    told = found.to_dict()
    told["columns"] = [
        {
            "key": c.key,
            "title": c.title,
            "axis": c.axis,
            "higher": c.higher,
            "unit": c.unit,
            "scale": c.scale,
            "equal": c.equal,
        }
        for c in COLUMNS
    ]
    told["shown"] = [str(found.question.asked[place]) for place in places]
    told["busy"] = found.busy
    told["tiers"] = [{"floor": max(floor, -1.0), "words": words} for floor, words in TIERS]
    told["advice"] = {item.key: item.row.name for item in advice(found) if item.row is not None}
    told["explained"] = {row.name: explanation(row) for row in found.rows}
    told["strips"] = {name: [_uri(pictures[place]) for place in places] for name, pictures in found.pictures.items()}
    return told


def explanation(row: Row) -> str:
    """A line on what a set does, method by method."""
    if not row.methods:
        return "Every step computes everything: what all others are held against."
    return " ".join(about(name) for name in Candidate(row.methods).names)


def _uri(picture: Pictures) -> str:
    packed = io.BytesIO()
    as_picture(picture).save(packed, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode("ascii")


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _items(sentences: Iterable[str]) -> str:
    return "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)


def _choice(told: list[str]) -> str:
    if not told:
        return ""
    lines = "".join(f"<p>{escape(line)}</p>" for line in told if not line.startswith("ditloom "))
    flags = "".join(_copyable(line) for line in told if line.startswith("ditloom "))
    return f'<div class="choice">{lines}{flags}</div>'


def _copyable(command: str) -> str:
    return f'<button class="copy" type="button" title="copy"><code>{escape(command)}</code></button>'


def _merged(listed: Sequence[Advice]) -> list[list[Advice]]:
    """Neighbours that advise the same set share a card."""
    return [list(same) for _, same in groupby(listed, key=lambda item: item.row and item.row.name)]


def _card(found: Comparison, items: Sequence[Advice]) -> str:
    first = items[0]
    title, row = escape(", ".join(item.title for item in items)), first.row
    if row is None:
        body = f'<p class="none">Nothing here is faster and above {first.floor:g} dB.</p>'
        return f'<article class="card {first.key}"><h3>{title}</h3>{body}</article>'
    psnr = row.value("psnr") or 0.0
    rivals = "".join(_rival(found, item) for item in {item.rival and item.rival.name: item for item in items}.values())
    return (
        f'<article class="card {first.key}" data-set="{escape(row.name)}"><h3>{title}</h3>'
        f'<p class="big">{pace(found, row):.1f}<span>x {unit(found)}</span></p>'
        f'<p class="name">{_breaking(row.name)}</p><p class="why">{escape(explanation(row))}</p>'
        f'<p class="looks"><b>{psnr:.1f} dB</b> {escape(looks(psnr))}</p>{rivals}'
        '<div class="thumbs" aria-hidden="true"></div>'
        f"{_copyable(found.command(row))}</article>"
    )


def _rival(found: Comparison, item: Advice) -> str:
    """Beside a method what fewer steps reach at that level, and the other way round."""
    if item.row is None:
        return ""
    kind = "the best method" if Candidate(item.row.methods).is_control else "fewer steps"
    if item.rival is None:
        return f'<p class="rival">Above {item.floor:g} dB {kind} is not faster than the plain run.</p>'
    psnr = item.rival.value("psnr") or 0.0
    told = f"Above {item.floor:g} dB {kind}: {item.rival.name}, {pace(found, item.rival):.1f}x, {psnr:.1f} dB."
    return f'<p class="rival">{escape(told)}</p>'


def _heading(column: Column) -> str:
    number = "" if column.key == "name" else ' class="number"'
    return (
        f'<th scope="col"{number} title="{escape(column.meaning)}"><button type="button" data-key="{column.key}">'
        f"{escape(column.title)}</button></th>"
    )


def _row(found: Comparison, row: Row, columns: Sequence[Column]) -> str:
    kind = "plain" if not row.methods else "control" if Candidate(row.methods).is_control else "set"
    title = f'<a href="#"><i class="dot"></i>{_breaking(row.name)}</a>'
    name = f'<th scope="row">{title}<small>{escape(explanation(row))}</small></th>'
    if row.refused is not None:
        rest = f'<td class="refused" colspan="{len(columns) - 1}">{escape(row.refused)}</td>'
        return f'<tr class="refused {kind}" data-set="{escape(row.name)}">{name}{rest}</tr>'
    cells = "".join(_cell(column, found, row) for column in columns if column.key != "name")
    return f'<tr class="{kind}" data-set="{escape(row.name)}">{name}{cells}</tr>'


def _breaking(name: str) -> str:
    """A name that may be broken after its colons and commas."""
    return escape(name).replace(":", ":<wbr>").replace(",", ",<wbr>")


def _cell(column: Column, found: Comparison, row: Row) -> str:
    value = column.value(found, row)
    if value is None:
        return '<td class="number">&ndash;</td>'
    sign = "" if column.key != "margin" else " won" if value > 0 else " lost"
    return f'<td class="number{sign}" data-value="{value:.9g}">{escape(column.shown(value))}</td>'
