"""What every set of a comparison is asked to draw, and how: the protocol, in words and as a hash."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from shlex import quote
from typing import TYPE_CHECKING, Any

import torch

from ditloom.calibration import written
from ditloom.contracts.errors import UserError
from ditloom.contracts.metric import Protocol
from ditloom.contracts.registries import SAMPLERS
from ditloom.contracts.settings import registered
from ditloom.measure.drawing import model_hash
from ditloom.model import DEFAULTS

if TYPE_CHECKING:
    from ditloom.model import Input, Model

ONE_EVALUATION = {"sampler": DEFAULTS["sampler"], "steps": DEFAULTS["steps"]}


@dataclass(frozen=True)
class Group:
    """Pictures drawn together: their places among all, their seed, and the inputs' indices."""

    places: range
    seed: int
    indices: range


@dataclass(frozen=True, kw_only=True)
class Question:
    """Every input with every seed, in batches of `batch_size`; `settings` as `Model.settings` resolved them.

    Wall time is taken on the first batch, `repeats` times.
    """

    inputs: tuple[Input, ...]
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 4
    repeats: int = 3
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("--batch-size", self.batch_size), ("--repeats", self.repeats)):
            if value < 1:
                raise UserError(f"{name} must be at least 1; got {value}")
        if not self.inputs or not self.seeds:
            raise UserError("there is nothing to draw: give at least one prompt or class, and a seed")

    @property
    def pictures(self) -> int:
        """Pictures of each set."""
        return len(self.inputs) * len(self.seeds)

    @property
    def asked(self) -> list[Input]:
        """The input of every picture."""
        return list(self.inputs) * len(self.seeds)

    def groups(self) -> Iterator[Group]:
        """The batches, seed by seed."""
        for turn, seed in enumerate(self.seeds):
            for start in range(0, len(self.inputs), self.batch_size):
                indices = range(start, min(start + self.batch_size, len(self.inputs)))
                first = turn * len(self.inputs) + start
                yield Group(range(first, first + len(indices)), seed, indices)

    def with_seeds(self, seeds: Sequence[int]) -> Question:
        """The same asked with other seeds."""
        return Question(**{**vars(self), "seeds": tuple(seeds)})


def sampling_for(model: Model, **given: Any) -> tuple[dict[str, Any], str | None]:
    """The settings to compare with, and a sentence where they are not the model's own.

    A model whose own solver evaluates the network several times a step is compared on one that does so once, unless a
    sampler is given: methods act on the first evaluation of a step, so the others would only hide them.
    """
    own = model.settings(**given)
    if given.get("sampler") is not None or _evaluations(own, 10) == 10:
        return own, None
    changed = {**ONE_EVALUATION, **{k: v for k, v in given.items() if v is not None}}
    told = (
        f"{own['sampler']} evaluates the network more than once a step and methods act on the first evaluation, so the "
        f"comparison runs on {changed['sampler']}, {changed['steps']} steps; --sampler {own['sampler']} keeps it"
    )
    return model.settings(**changed), told


def drawn_as(model: Model, settings: Mapping[str, Any]) -> str:
    """The command that draws like the plain run: the model, and the settings that are not its own."""
    own, names = {**model.settings(), "negative": None}, ("steps", "sampler", "guidance", "size", "negative")
    asked = {name: settings[name] for name in names if settings.get(name) not in (None, own[name])}
    if isinstance(asked.get("size"), Sequence):
        asked["size"] = "x".join(map(str, asked["size"]))
    listed = {"model": written(model), **asked}
    return " ".join(["ditloom generate", *(f"--{name} {quote(str(value))}" for name, value in listed.items())])


def evaluations_of(settings: Mapping[str, Any], steps: int) -> int:
    """Evaluations of the network in a run of so many steps."""
    return _evaluations(settings, steps)


def _evaluations(settings: Mapping[str, Any], steps: int) -> int:
    return int(registered(SAMPLERS, settings["sampler"]).evaluations(steps))


def protocol(model: Model, question: Question, extractor: str) -> Protocol:
    """Everything that must be equal before two rows may be compared: wall time counts, so the machine is part."""
    settings, device = question.settings, model.backbone.device
    inputs = hashlib.blake2b(json.dumps(list(question.inputs)).encode(), digest_size=8).hexdigest()
    extra = {
        "inputs": f"{len(question.inputs)} with hash {inputs}",
        "batch_size": question.batch_size,
        "repeats": question.repeats,
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "machine": machine(device),
        "torch": torch.__version__,
        **{name: settings[name] for name in ("size", "negative") if settings.get(name) is not None},
    }
    return Protocol(
        metric="comparison with the plain run",
        model=f"{model.info.get('name', 'model')} {model_hash(model)}",
        extractor=extractor,
        samples=question.pictures,
        sampler=str(settings["sampler"]),
        steps=int(settings["steps"]),
        guidance=str(settings["guidance"]),
        seeds=", ".join(map(str, question.seeds)),
        extra=json.loads(json.dumps(extra, default=str)),
    )


def machine(device: torch.device) -> str:
    """The name of what computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def in_words(said: Protocol) -> list[str]:
    """The protocol as sentences for people."""
    more, one = said.extra, said.samples == 1
    threads = f"{more['threads']} thread{'s' * (more['threads'] != 1)}"
    return [
        f"Model {said.model.rpartition(' ')[0]} (weights {said.model.rpartition(' ')[2]}).",
        f"Every set draws the same {said.samples} picture{'' if one else 's'} from the same noise: "
        f"{more['inputs'].partition(' ')[0]} inputs, seed{'s' * (',' in said.seeds)} {said.seeds}, "
        f"{more['batch_size']} at a time.",
        f"The plain run takes {said.steps} steps of {said.sampler} under {said.guidance}, in {more['dtype']}.",
        f"Wall time is from inputs to decoded pictures of the first batch, on {more['machine']} ({more['device']}, "
        f"{threads}, torch {more['torch']}): the median of {more['repeats']} turns after one to warm up, each beside a "
        "turn of the plain run.",
        f"Similarity is measured picture by picture against the plain run; {said.extractor} looks at whole samples.",
    ]
