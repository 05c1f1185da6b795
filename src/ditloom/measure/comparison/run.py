"""A comparison from its question to its answer: the plain run, every set, the controls that cost as much, the pick."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ditloom.contracts.errors import UserError
from ditloom.contracts.metric import Protocol
from ditloom.measure.comparison.bench import FAILED, Bench
from ditloom.measure.comparison.calibrating import calibrated
from ditloom.measure.comparison.candidates import PLAIN, Candidate, about, candidates, fewer_steps
from ditloom.measure.comparison.choice import HIGHER_IS_BETTER, Budget, Pick, Quality, better, pick
from ditloom.measure.comparison.folder import Folder
from ditloom.measure.comparison.front import matched_steps, pareto
from ditloom.measure.comparison.presets import preset as sets_of
from ditloom.measure.comparison.question import Question, evaluations_of, in_words, protocol, sampling_for
from ditloom.measure.comparison.row import Row, by_name
from ditloom.measure.comparison.scores import NO_DATA, scorer
from ditloom.training.durable import explained, json_bytes, replace_file

if TYPE_CHECKING:
    from ditloom.measure.evidence import Pictures, Real
    from ditloom.model import Input, Model

ANCHORS = (2 / 3, 1 / 2, 1 / 3)
"""Shares of the steps at which a preset places the control besides the matched ones; the half always has one."""
FORMAT = 1
QUIET = 0.85
"""A process that is not held up by others has at least so much of one processor."""
CHECK = "check"
Follow = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Choice:
    """What was picked on the seeds of the table, and how it did on seeds it was not picked on.

    confirmed: the plain run, the pick and its control on those seeds; kept: whether it still is what was wanted there.
    """

    pick: Pick
    protocol: Protocol | None = None
    confirmed: tuple[Row, ...] = ()
    kept: bool | None = None

    @property
    def again(self) -> Row | None:
        """The pick on seeds it was not picked on."""
        return by_name(self.confirmed, self.pick.best.name) if self.pick.best is not None else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        best, nearest = (row.name if row else None for row in (self.pick.best, self.pick.nearest))
        said = None if self.protocol is None else {**asdict(self.protocol), "hash": self.protocol.hash}
        confirmed = [row.to_dict() for row in self.confirmed]
        picked = {"wanted": self.pick.wanted, "best": best, "nearest": nearest, "kept": self.kept}
        return {**picked, "protocol": said, "confirmed": confirmed}


@dataclass(frozen=True)
class Comparison:
    """Rows (the plain run first, then the sets, then the controls) under one protocol, with their pictures by name."""

    protocol: Protocol
    question: Question
    rows: tuple[Row, ...]
    pictures: Mapping[str, Pictures]
    remarks: tuple[str, ...] = ()
    choice: Choice | None = None

    @property
    def plain(self) -> Row:
        """The run that all others are held against."""
        return self.rows[0]

    @property
    def ran(self) -> list[Row]:
        """The sets and controls that could run."""
        return [row for row in self.rows[1:] if row.refused is None]

    @property
    def busy(self) -> bool:
        """Whether other work of the machine spoilt the wall times."""
        return busy_share(self.rows) is not None

    def row(self, name: str) -> Row:
        """The row of a set as it is written."""
        found = by_name(self.rows, name)
        if found is None:
            raise UserError(f"{name!r} is not in this comparison")
        return found

    def front(self, metric: str = "psnr") -> list[Row]:
        """The rows that no other beats in both wall time and a metric, the fastest first."""
        scored = [row for row in self.ran if row.value(metric) is not None]
        return [scored[i] for i in pareto([(row.speedup, better(metric)(row)) for row in scored])]

    def control_of(self, row: Row) -> Row | None:
        """The plain run of fewer steps that takes at least as many multiply-accumulates, rounded up to a step."""
        steps = self._matched(row)
        return None if steps is None else by_name(self.rows, fewer_steps(steps).name)

    def margin(self, row: Row, metric: str = "psnr") -> float | None:
        """By how much a row is better than its control, positive where it is."""
        control = self.control_of(row)
        mine, theirs = row.value(metric), control.value(metric) if control is not None else None
        if mine is None or theirs is None or row is control:
            return None
        return mine - theirs if HIGHER_IS_BETTER[metric] else theirs - mine

    def _matched(self, row: Row) -> int | None:
        return matched(row, self.plain, self.question)

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write comparison.json and comparison.html, and return where they are."""
        from ditloom.measure.comparison.page import save_page

        numbers, page = Path(folder) / "comparison.json", Path(folder) / "comparison.html"
        with explained("write to", numbers):
            numbers.parent.mkdir(parents=True, exist_ok=True)
            replace_file(numbers, [json_bytes(self.to_dict()) + b"\n"])
        save_page(self, page)
        return numbers, page

    def to_dict(self) -> dict[str, Any]:
        """What comparison.json holds."""
        return {
            "format": FORMAT,
            "protocol": {**asdict(self.protocol), "hash": self.protocol.hash, "words": in_words(self.protocol)},
            "inputs": list(self.question.inputs),
            "seeds": list(self.question.seeds),
            "remarks": list(self.remarks),
            "methods": {name: about(name) for row in self.rows for name in Candidate(row.methods).names},
            "rows": [self._row_dict(row) for row in self.rows],
            "front": {metric: [row.name for row in self.front(metric)] for metric in HIGHER_IS_BETTER},
            "choice": None if self.choice is None else self.choice.to_dict(),
        }

    def _row_dict(self, row: Row) -> dict[str, Any]:
        control = self.control_of(row) if row.refused is None and row.methods else None
        margins = {metric: self.margin(row, metric) for metric in HIGHER_IS_BETTER} if control is not None else {}
        flags = Candidate(row.methods).flags
        return {**row.to_dict(), "flags": flags, "matched": control.name if control else None, "margins": margins}


def matched(row: Row, plain: Row, question: Question) -> int | None:
    """The number of steps of the control of a row; None for the plain run, controls and what saves nothing."""
    if row.refused is not None or not row.methods or Candidate(row.methods).is_control:
        return None
    steps = int(question.settings["steps"])
    return matched_steps(row.macs, plain.macs, steps, lambda n: evaluations_of(question.settings, n))


@dataclass
class _Ledger:
    """Rows and pictures measured so far: taken from a folder where they are there, else measured and kept."""

    bench: Bench
    folder: Folder | None
    follow: Follow
    rows: dict[Candidate, Row] = field(default_factory=dict)
    pictures: dict[str, Pictures] = field(default_factory=dict)
    done: int = 0
    total: int = 0

    def measure(self, wanted: Sequence[Candidate], later: int = 0) -> None:
        """Measure what is not yet there; `later`: more work that is expected after it."""
        missing = [candidate for candidate in wanted if not self._found(candidate)]
        self.total = self.done + later + sum(map(self._work, missing))
        for candidate in missing:
            before = self.done
            self.bench.on_step = lambda name=candidate.name: self._step(name)  # type: ignore[misc]
            row, pictures = self.bench.measured(candidate)
            if self.folder is not None and not (row.refused or "").startswith(FAILED):
                self.folder.keep(candidate, row, pictures)
            self._note(candidate, row, pictures)
            self.done = before + self._work(candidate)

    def _found(self, candidate: Candidate) -> bool:
        if candidate in self.rows:
            return True
        row = self.folder.row(candidate) if self.folder is not None else None
        if row is None or self.folder is None:
            return False
        pictures = None if row.refused is not None else self.folder.pictures(candidate)
        self._note(candidate, row, pictures)
        if candidate == PLAIN and pictures is not None:
            self.bench.knows_plain(row, pictures)
        return True

    def _note(self, candidate: Candidate, row: Row, pictures: Pictures | None) -> None:
        self.rows[candidate] = replace(row, name=candidate.name, methods=candidate.methods, control=candidate.control)
        if pictures is not None:
            self.pictures[candidate.name] = pictures

    def _step(self, name: str) -> None:
        self.done += 1
        self.follow(name, self.done, max(self.total, self.done))

    def _work(self, candidate: Candidate) -> int:
        """Steps of batches that measuring takes."""
        question = self.bench.question
        steps = int(question.settings["steps"])
        own = int(candidate.methods[0].rpartition("=")[2]) if candidate.control else steps
        turns = question.repeats * (own if candidate == PLAIN else own + steps)
        return sum(1 for _ in question.groups()) * own + turns


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
    ledger.measure(plain_and, later=len(wanted) * ledger._work(PLAIN) // 2)
    controls = list(_controls(ledger, wanted, preset is not None))
    ledger.measure(controls)
    rows = tuple(ledger.rows[candidate] for candidate in dict.fromkeys([*plain_and, *controls]))
    remarks = tuple(sentence for sentence in (told, made, _busy(rows)) if sentence is not None)
    found = Comparison(said, question, rows, ledger.pictures, remarks)
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


def _ledger(
    model: Model,
    question: Question,
    extractor: str | None,
    real: Callable[[], Real] | None,
    place: Path | None,
    follow: Follow,
) -> tuple[_Ledger, Protocol]:
    score = scorer(model, question.asked, extractor, real)
    said = protocol(model, question, score.extractor.tag)
    folder = None if place is None else Folder(place)
    if folder is not None:
        folder.claim(said)
    return _Ledger(Bench(model, question, score), folder, follow), said


def busy_share(rows: Sequence[Row]) -> float | None:
    """The share of one processor that this process had while time was taken, where others held it up; else None."""
    shares = [row.processor_share for row in rows if row.processor_share is not None]
    return median(shares) if shares and median(shares) < QUIET else None


def _busy(rows: Sequence[Row]) -> str | None:
    share = busy_share(rows)
    if share is None:
        return None
    return (
        f"The machine was busy: while time was taken this process had {share:.0%} of one processor. Wall times are "
        "rough and single ones wrong, so the verdict counts arithmetic; measure again on a quiet machine."
    )


def _controls(ledger: _Ledger, wanted: Sequence[Candidate], many: bool) -> Iterator[Candidate]:
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


def _chosen(
    found: Comparison, budget: Budget | None, quality: Quality | None, check: _Ledger, said: Protocol
) -> Choice:
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
