"""A comparison from its question to its answer: the plain run, every set, the controls that cost as much, the pick."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditloom.contracts.errors import UserError
from ditloom.contracts.metric import Protocol
from ditloom.measure.comparison.answer import Choice, Comparison, busy_share, matched
from ditloom.measure.comparison.bench import Bench
from ditloom.measure.comparison.calibrating import calibrated
from ditloom.measure.comparison.candidates import PLAIN, Candidate, candidates, fewer_steps
from ditloom.measure.comparison.choice import Budget, Quality, pick
from ditloom.measure.comparison.folder import Folder
from ditloom.measure.comparison.ledger import Follow, Ledger
from ditloom.measure.comparison.presets import preset as sets_of
from ditloom.measure.comparison.question import Question, drawn_as, protocol, sampling_for
from ditloom.measure.comparison.row import Row
from ditloom.measure.comparison.scores import NO_DATA, scorer

if TYPE_CHECKING:
    from ditloom.measure.evidence import Real
    from ditloom.model import Input, Model

ANCHORS = (2 / 3, 1 / 2, 1 / 3)
"""Shares of the steps at which a preset places the control besides the matched ones; the half always has one."""
CHECK = "check"
EXAMPLES = (
    "a red apple",
    "grinning face",
    "rocket",
    "a sad cat",
    "red heart",
    "house with garden",
    "bicycle",
    "sun behind cloud",
)


def compare(
    model: Model,
    sets: Sequence[str] = (),
    *,
    sweep: Sequence[str] = (),
    preset: str | None = None,
    inputs: Sequence[Input] | None = None,
    seeds: Sequence[int] = (0,),
    check_seeds: Sequence[int] = (),
    steps: int | None = None,
    sampler: str | None = None,
    guidance: Any = None,
    size: Any = None,
    negative: Input = None,
    batch_size: int = 4,
    repeats: int = 3,
    budget: str | None = None,
    quality: str | None = None,
    extractor: str | None = None,
    real: Callable[[], Real] | None = None,
    folder: str | Path | None = None,
    follow: Follow = lambda name, done, total: None,
) -> Comparison:
    """Run every set on the same pictures, and the plain run with as few steps as cost the same beside them.

    sets: 'fora:interval=2', 'teacache + guidance-gate'. sweep: 'fbcache:threshold=0.05|0.1', every combination of the
    listed values. preset: a named list of sets. inputs: prompts or classes (by default every class, or the model's
    example prompts), each drawn with each of `seeds`. budget ("2x") and quality ("psnr>30") pick a set, which is then
    measured again on `check_seeds`, by default as many as `seeds` and other ones. folder: where rows are kept as they
    finish, so that an interrupted comparison goes on. real: gives the real pictures for a Frechet distance. follow:
    called with what is measured, the work done and the whole of it.
    """
    wanted = candidates(sets, sweep, sets_of(preset))
    limits = (Budget.read(budget) if budget else None, Quality.read(quality) if quality else None)
    given = {"steps": steps, "sampler": sampler, "guidance": guidance, "size": size}
    settings, told = sampling_for(model, **given)
    asked = tuple(inputs) if inputs is not None else default_inputs(model)
    question = Question(
        inputs=asked,
        seeds=tuple(seeds),
        batch_size=batch_size,
        repeats=repeats,
        settings={**settings, "negative": negative},
    )
    others = _other_seeds(question.seeds, check_seeds) if any(limits) else ()
    plain_and = [PLAIN, *wanted]
    place = Path(folder) if folder is not None else None
    made = calibrated(model, wanted, question, lambda: follow("calibration", 0, 1))
    ledger, said = _ledger(model, question, extractor, real, place, follow)
    ledger.measure(plain_and, later=len(wanted) * ledger.work(PLAIN) // 2)
    controls = list(_controls(ledger, wanted, preset is not None))
    ledger.measure(controls)
    rows = tuple(ledger.rows[candidate] for candidate in dict.fromkeys([*plain_and, *controls]))
    remarks = tuple(sentence for sentence in (told, made, _busy(rows)) if sentence is not None)
    found = Comparison(said, question, rows, ledger.pictures, remarks, drawing=drawn_as(model, question.settings))
    if not any(limits):
        return found
    check = _ledger(model, question.with_seeds(others), extractor, real, place and place / CHECK, follow)
    return replace(found, choice=_chosen(found, *limits, *check))


def default_inputs(model: Model) -> tuple[Input, ...]:
    """Every class of a model that has classes, else a few prompts."""
    from ditloom.conditions.labels import Labels

    labels = model.conditioner
    if isinstance(labels, Labels):
        return tuple(labels.names or range(labels.num_classes))
    return EXAMPLES


def _ledger(
    model: Model,
    question: Question,
    extractor: str | None,
    real: Callable[[], Real] | None,
    place: Path | None,
    follow: Follow,
) -> tuple[Ledger, Protocol]:
    score = scorer(model, question.asked, extractor, real)
    said = protocol(model, question, score.extractor.tag)
    folder = None if place is None else Folder(place)
    if folder is not None:
        folder.claim(said)
    return Ledger(Bench(model, question, score), folder, follow), said


def _busy(rows: Sequence[Row]) -> str | None:
    share = busy_share(rows)
    if share is None:
        return None
    return (
        f"The machine was busy: while time was taken this process had {share:.0%} of one processor. Wall times are "
        "rough and single ones wrong, so the verdict counts arithmetic; measure again on a quiet machine."
    )


def _controls(ledger: Ledger, wanted: Sequence[Candidate], many: bool) -> Iterator[Candidate]:
    """The control of every set, and some more, by falling number of steps."""
    question, plain = ledger.bench.question, ledger.rows[PLAIN]
    steps = int(question.settings["steps"])
    found = {matched(ledger.rows[candidate], plain, question) for candidate in wanted}
    found |= {round(steps * share) for share in (ANCHORS if many else (1 / 2,))}
    there = {candidate.methods for candidate in wanted}
    for count in sorted((n for n in found if n is not None and 1 <= n < steps), reverse=True):
        if fewer_steps(count).methods not in there:
            yield fewer_steps(count)


def _other_seeds(seeds: Sequence[int], given: Sequence[int]) -> tuple[int, ...]:
    """Seeds to evaluate a pick on; none of them may have served to pick it."""
    others = tuple(given) or tuple(range(max(seeds) + 1, max(seeds) + 1 + len(seeds)))
    shared = sorted({*others} & {*seeds})
    if shared:
        raise UserError(f"seed {shared[0]} is both searched and checked on: a pick is only checked on other seeds")
    return others


def _chosen(found: Comparison, budget: Budget | None, quality: Quality | None, check: Ledger, said: Protocol) -> Choice:
    if quality is not None and all(row.value(quality.metric) is None for row in found.ran):
        why = next((row.absent[quality.metric] for row in found.ran if quality.metric in row.absent), NO_DATA)
        raise UserError(f"no set can be judged by {quality.metric} here: {why}")
    made = pick(found.ran, budget, quality)
    if made.best is None:
        return Choice(made)
    control = found.control_of(made.best)
    names = [made.best.name, *([control.name] if control is not None else [])]
    wanted = [PLAIN, *(Candidate(found.row(name).methods, found.row(name).control) for name in names)]
    check.measure(wanted)
    rows = tuple(check.rows[candidate] for candidate in wanted)
    return Choice(made, said, rows, pick(rows[1:2], budget, quality).best is not None)
