"""What a person asks to see: prompts, a file of prompts, classes; the seeds to draw each with; how to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditloom.caches.presets import expanded
from ditloom.contracts.errors import UserError
from ditloom.contracts.registries import GUIDANCE, METHODS, SAMPLERS
from ditloom.contracts.registry import Registry
from ditloom.contracts.settings import parse

if TYPE_CHECKING:
    from ditloom.model import Input, Model

MOST_SEEDS = 100_000


def inputs_of(model: Model, prompts: Sequence[str], file: Path | None, classes: str | None) -> list[Input]:
    """One input per picture; nothing asked for is one unconditional picture."""
    given = [name for name, value in (("prompts", prompts), ("--prompts", file), ("--classes", classes)) if value]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} say twice what to draw: give one of them")
    if classes is not None:
        return classes_of(model, classes)
    inputs: list[Input] = list(read_prompts(file)) if file is not None else list(prompts)
    return named(model, inputs) or [None]


def classes_of(model: Model, listed: str) -> list[Input]:
    """Classes from names and numbers with commas between, or "all"."""
    from ditloom.conditions.labels import Labels

    if not isinstance(model.conditioner, Labels):
        name = model.info.get("name", "this model")
        raise UserError(f"{name} knows no classes: leave out --classes and give prompts")
    if listed.strip().casefold() == "all":
        return named(model, list(range(model.conditioner.num_classes)))
    return named(model, [item.strip() for item in listed.split(",")])


def named(model: Model, inputs: Sequence[Input]) -> list[Input]:
    """Classes by their names where they have any; an unknown one is refused now, not at the ten-thousandth picture."""
    from ditloom.conditions.labels import Labels

    labels = model.conditioner
    if not isinstance(labels, Labels):
        return list(inputs)
    known: Sequence[Input] = labels.names or range(labels.num_classes)
    numbers = {value: labels.index(value) for value in dict.fromkeys(inputs)}
    return [known[numbers[value]] if numbers[value] < len(known) else None for value in inputs]


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file; empty ones are passed over."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read prompts from {path}: {reason}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt: it needs one a line")
    return prompts


def seeds_of(listed: str | None, single: int) -> list[int]:
    """ "0,7,12" or "0-15", or both; without a list the single seed."""
    if listed is None:
        return [single]
    seeds: list[int] = []
    for item in listed.split(","):
        first, dash, last = item.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"--seeds takes numbers and ranges such as 0,7,12 or 0-15; got {listed!r}")
        if int(last or first) - int(first) >= MOST_SEEDS:
            raise UserError(f"--seeds {item.strip()} is a range of more than {MOST_SEEDS:,} seeds")
        seeds += range(int(first), int(last or first) + 1)
    if len(set(seeds)) < len(seeds) or not seeds:
        raise UserError(f"--seeds must name each seed once, and a range must ascend; got {listed!r}")
    return seeds


def size_of(text: str | None) -> int | tuple[int, int] | None:
    """ "64" or "64x96" (height by width) in pixels."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise UserError(f"--size is a side or HEIGHTxWIDTH in pixels, such as 64 or 64x96; got {text!r}")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def settings_of(
    model: Model,
    *,
    steps: int | None,
    guidance: str | None,
    sampler: str | None,
    size: str | None,
    negative: str | None = None,
    using: Sequence[str] = (),
) -> dict[str, Any]:
    """What `Model.generate` takes, the model's own defaults filled in and every name and value looked at."""
    for registry, spec in (
        (SAMPLERS, sampler),
        (GUIDANCE, guidance),
        *((METHODS, method) for method in expanded(using)),
    ):
        if isinstance(spec, str) and not _is_number(spec):
            check_spec(registry, spec)
    settings = model.settings(steps=steps, guidance=guidance_of(guidance), sampler=sampler, size=size_of(size))
    shape = model.latent_shape(settings["size"])
    if size is not None:
        model.surface(shape)
    kept = {name: settings[name] for name in ("steps", "guidance", "sampler")}
    height, width = (side * model.latents.factor for side in shape[1:])
    return {**kept, "size": (height, width), "negative": negative, "using": tuple(using)}


def check_spec(registry: Registry, spec: str) -> None:
    """Refuse a name that is not known, a setting it has not, and a value of the wrong type."""
    from ditloom.training.config import read_settings

    name, given = parse(spec)
    target = registry.get(name)
    if isinstance(target, type) and is_dataclass(target):
        read_settings(target, given, f"{registry.kind} {name}")


def guidance_of(text: str | None) -> str | float | None:
    """A scale where the text is a number, else a rule such as "cfg:scale=3,end=0.8"."""
    return float(text) if text is not None and _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
