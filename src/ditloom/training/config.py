"""Settings of a training run: plain values, read from YAML, with every unknown key or name answered by the nearest."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.settings import named

Spec = str | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. Everything counts images: `images` in all, in global batches of `batch`.

    micro_batch: images per forward of one process (None: its whole share); gradients add up to the same sum.
    optimiser, schedule, averages, times: "name:key=value,..." or a mapping with a "name".
    times: distribution of noise levels (None: the process's own), moved by `shift`, stratified over the global batch.
    drop: share of conditions replaced by none. clip: limit of the gradient norm. precision: "fp32" or "bf16".
    parallel: "auto", "none", "ddp" or "fsdp". The `_every` fields are image counts, None for never; `keep` last
    checkpoints stay, and those at multiples of `mark_every`. snapshot_every: power averages kept for later widths.
    """

    images: int = 100_000
    batch: int = 32
    micro_batch: int | None = None
    seed: int = 0
    optimiser: Spec = "adamw:lr=1e-4"
    schedule: Spec = "constant"
    clip: float | None = None
    averages: tuple[Spec, ...] = ("ramped:value=0.9999",)
    times: Spec | None = None
    shift: float = 1.0
    stratified: bool = False
    drop: float = 0.1
    precision: str = "fp32"
    compile: bool = False
    checkpointing: bool = False
    parallel: str = "auto"
    log_every: int = 1_000
    save_every: int = 20_000
    keep: int = 2
    mark_every: int | None = None
    sample_every: int | None = None
    snapshot_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("images", "batch", "log_every", "save_every", "keep"):
            at_least_one(name, getattr(self, name))
        for name in ("micro_batch", "mark_every", "sample_every", "snapshot_every"):
            if getattr(self, name) is not None:
                at_least_one(name, getattr(self, name))
        if not 0 <= self.drop < 1:
            raise UserError(f"drop is a share of the conditions, at least 0 and below 1; got {self.drop}")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"clip must be above 0; got {self.clip}")
        self._check_names()

    def _check_names(self) -> None:
        """Build everything that has a name once, so that a mistake is known before the first image."""
        from ditloom.processes.times import TIMES, time_sampler
        from ditloom.training.ema import PROFILES
        from ditloom.training.optim import OPTIMISERS
        from ditloom.training.parallel import PARALLEL
        from ditloom.training.precision import precision_of
        from ditloom.training.schedules import SCHEDULES

        named("optimiser", OPTIMISERS, self.optimiser)
        named("schedule", SCHEDULES, self.schedule)
        for spec in self.averages:
            named("average", PROFILES, spec)
        if self.times is not None:
            time_sampler(named("time distribution", TIMES, self.times), self.shift, self.stratified)
        precision_of(self.precision)
        if self.parallel not in (*PARALLEL, "auto"):
            raise UnknownName("parallel mode", self.parallel, (*PARALLEL, "auto"))

    @property
    def total(self) -> int:
        """Images of the whole run: whole batches only."""
        return -(-self.images // self.batch) * self.batch

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to YAML."""
        return plain(asdict(self))


def read_settings(cls: type[Any], values: Any, where: str) -> Any:
    """A settings dataclass from a mapping; an unknown key or a value of the wrong type is one clear sentence."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must hold settings as key: value, got {values!r}")
    types_of = typing.get_type_hints(cls)
    known = [field.name for field in fields(cls) if field.init]
    for key in values:
        if key not in known:
            raise UnknownName(f"setting in {where}", str(key), known)
    return cls(**{key: _read(types_of[key], value, f"{where}.{key}") for key, value in values.items()})


def _read(wanted: Any, value: Any, where: str) -> Any:
    options = _options(wanted)
    if float in options and isinstance(value, int) and not isinstance(value, bool) and int not in options:
        return float(value)
    if str in options and float in options or not isinstance(value, str):
        return _as_option(options, value, where)
    if float in options:
        return _number(value, where)
    return _as_option(options, value, where)


def _as_option(options: list[Any], value: Any, where: str) -> Any:
    for option in options:
        if option is Any or _fits(option, value):
            return tuple(value) if isinstance(value, list) else value
    names = " or ".join(_name(option) for option in options)
    raise UserError(f"{where} must be {names}; got {value!r}")


def _fits(option: Any, value: Any) -> bool:
    origin = typing.get_origin(option) or option
    if origin is typing.Literal:
        return value in typing.get_args(option)
    if origin is tuple:
        return isinstance(value, list | tuple)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin)


def _options(wanted: Any) -> list[Any]:
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return [option for part in typing.get_args(wanted) for option in _options(part)]
    return [wanted]


def _number(text: str, where: str) -> float:
    """YAML reads 1e-4 as text; people write it."""
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where} must be a number; got {text!r}") from None


def _name(option: Any) -> str:
    origin = typing.get_origin(option) or option
    if origin is typing.Literal:
        return " or ".join(str(value) for value in typing.get_args(option))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a list"}
    return names.get(origin, "nothing" if origin is type(None) else "a mapping")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; one sentence where it cannot be read."""
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"could not read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = "" if line is None else f" in line {line + 1}"
        raise UserError(f"{path} is not valid YAML{place}") from error


def plain(value: Any) -> Any:
    """Mappings, lists and scalars only."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def at_least_one(name: str, value: int) -> None:
    """Refuse counts below one."""
    if value < 1:
        raise UserError(f"{name} must be at least 1; got {value}")
