"""A method: frozen settings that bind to a model and give a handler, which acts at sites during a run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from ditloom.contracts.clock import Clock, Rows, Schedule
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site

if TYPE_CHECKING:
    from ditloom.sites.surface import Surface

Lifetime = Literal["step", "run", "condition", "model"]
TapOp = Literal["capture", "replace", "add", "lerp", "copy-rows", "append"]
Steps = Sequence[Mapping[Site, Action]]


class Codec(Protocol):
    """What is stored of a site's input x and output y, and how y is rebuilt from a later x."""

    def encode(self, x: Any, y: Any) -> Any: ...

    def decode(self, x: Any, z: Any) -> Any: ...


class Predictor(Protocol):
    """A stored value's estimate at step s from the computed ones: `history` holds (step, z), newest last.

    depth: how many are kept; so many must be there, unless the predictor has an attribute `least` that says fewer.
    One whose rule depends on the length of a run has a method `on(schedule)` that returns it for that run.
    """

    @property
    def depth(self) -> int: ...

    def __call__(self, history: Sequence[tuple[int, Any]], step: int) -> Any: ...


@dataclass(frozen=True)
class Touch:
    """What a method does at a kind of site, known before it is bound; legality and listings follow from it."""

    kind: str
    how: Literal["around", "capture", "replace", "add", "lerp", "segment", "rule"]

    def __str__(self) -> str:
        return f"{self.how} {self.kind}"


@dataclass(frozen=True)
class Control:
    """A site a handler may compute or reuse, with how its output is stored and predicted.

    pure: not stored on a step on which the same handler has reused something else.
    """

    site: Site
    codec: Codec
    predictor: Predictor
    pure: bool = False


@dataclass(frozen=True)
class Probe:
    """A read-only look before a decision: a value of the current forward, of the leading branch's rows.

    kind: "modulated_in" or "block_in" (at `block`), "residual" (what enters block j minus what enters block i, over
    `span`), "time_embedding". Values are of the image stream, or the time embedding [B, D].
    """

    kind: str
    block: int = 0
    span: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Tap:
    """Capture or change the tensor at one stage: stage name, block (None: at run level), operation and target.

    stage: block_in, block_out, a block's site or stage (attn, q_proj, v_proj, logits, ...). gradient: keep the
    graph of a capture. branches: act on these only (None: all).
    """

    stage: str
    block: int | None = None
    op: TapOp = "capture"
    stream: str = "image"
    segment: str | None = None
    number: float = 0.0
    gradient: bool = False
    branches: tuple[str, ...] | None = None


class Handler:
    """What acts during a run. Every part has an empty default; a handler implements the few it needs.

    A handler may also be an `nn.Module` with parameters of its own. It keeps what it learns within a run in the
    `memo` dict it is handed, and never in itself. The memo is new for each run; of a handler that controls sites it
    is emptied when the latent is changed from outside, together with what is stored.
    """

    key: str = ""

    def controls(self, surface: Surface) -> Sequence[Control]:
        """The sites it may reuse. Only these are stored, and only while a later step can use them."""
        return ()

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        """For every step, the action at each controlled site (DEFER: ask `decide`); absent means compute."""
        return [{} for _ in range(schedule.steps)]

    def probes(self, site: Site) -> Sequence[Probe]:
        """What `decide` wants to see at a deferred site."""
        return ()

    def decide(
        self, site: Site, probes: Mapping[Probe, Tensor], clock: Clock, ready: bool, memo: dict[str, Any]
    ) -> Action:
        """The action at a deferred site; asked once per step, obeyed by all branches.

        ready: whether enough is stored to reuse; when False the site computes whatever the answer.
        """
        raise NotImplementedError

    def at_most(self, site: Site, clock: Clock, ready: bool, memo: dict[str, Any]) -> Action:
        """The most that `decide` may reuse at a site, whatever it sees, for estimates before a run; asked as it is."""
        return Action.REUSE if ready else Action.COMPUTE

    def observe(self, clock: Clock, outputs: Mapping[str, Tensor], memo: dict[str, Any]) -> None:
        """After the first evaluation of a sampling step: the predictions of each branch that was really computed."""

    def rows(self, site: Site, clock: Clock, rows: Rows, memo: dict[str, Any]) -> Tensor:
        """For action ROWS: token indices [B, k] to compute afresh."""
        raise NotImplementedError

    def mix(self, site: Site, clock: Clock) -> Tensor:
        """For action MIX: the weight of the computed output, in [0, 1]."""
        raise NotImplementedError

    def keeps_mixed(self, site: Site, clock: Clock) -> bool:
        """For action MIX: whether the mixed output replaces the stored one."""
        return True

    def taps(self, schedule: Schedule, surface: Surface) -> Sequence[Sequence[Tap]]:
        """For every step, its taps."""
        return [()] * schedule.steps

    def provide(self, tap: Tap, clock: Clock, rows: Rows) -> Any:
        """The tensor that a replace, add, lerp or append tap puts in (a pair (k, v) for append)."""
        raise NotImplementedError

    def captured(self, tap: Tap, value: Any, clock: Clock, rows: Rows) -> None:
        """Receives what a capture tap saw."""

    def noted(self, tap: Tap, value: Any, clock: Clock, rows: Rows, memo: dict[str, Any]) -> None:
        """The same with the run's memo, for what a later decision needs; by default handed to `captured`."""
        self.captured(tap, value, clock, rows)

    def remarks(self, memo: dict[str, Any]) -> Sequence[str]:
        """Sentences for the user after the last step, such as a threshold that was never met."""
        return ()

    def segments(self, clock: Clock, rows: Rows) -> Sequence[Segment]:
        """Further token segments of this forward."""
        return ()

    def rule(self, layout: Layout, clock: Clock, rows: Rows) -> tuple[Any, Mapping[str, Tensor]] | None:
        """An attention rule and its gate tensors, or None to leave it as it is."""
        return None

    def velocity(self, predictions: dict[str, Tensor], clock: Clock) -> dict[str, Tensor]:
        """Change the branches' predictions before guidance combines them."""
        return predictions

    def latent(self, x: Tensor, clock: Clock, when: Literal["before", "after"]) -> tuple[Tensor, bool]:
        """Change the latent before or after a solver step; True resets solver history and stored state."""
        return x, False


@dataclass(frozen=True)
class Assets:
    """What calibration or training gave a method: tensors, and the fingerprint of what they were made for."""

    tensors: Mapping[str, Tensor]
    made_for: Mapping[str, Any] = field(default_factory=dict)

    def check(self, method: str, /, **now: Any) -> None:
        """Refuse use with another model, process, sampler, step count or guidance."""
        from ditloom.contracts.errors import UserError

        unlike = self.unlike(**now)
        if unlike:
            raise UserError(f"the calibration of {method} was made for {'; '.join(unlike)}: calibrate again")

    def unlike(self, **now: Any) -> list[str]:
        """What differs between what it was made for and now, each in a few words."""
        known = {name: value for name, value in now.items() if name in self.made_for}
        return [
            f"{name} {self.made_for[name]} and this run has {value}"
            for name, value in known.items()
            if self.made_for[name] != value
        ]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Settings of one published method, with its published defaults; registered by `@register(key, paper=...)`."""

    @classmethod
    @abstractmethod
    def touches(cls) -> Sequence[Touch]:
        """What it acts on."""

    @abstractmethod
    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        """The handler for one model; raises `UserError` where the model lacks a site it needs."""

    def sampling(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """The sampling settings it changes (steps, sampler, ...), asked before a run; most change none."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Learned(Method):
    """A method that reads what `ditloom calibrate` has learned of the same model: measured by a plain run, or trained.

    calibration: a file to read in place of the one that is kept with the model.
    """

    calibration: str = ""

    @property
    def needs_calibration(self) -> bool:
        """Whether these settings do nothing sensible without one."""
        return True

    @property
    def tolerates(self) -> frozenset[str]:
        """What a calibration may have been made for that this run is not, such as "steps"."""
        return frozenset()

    def learned(self, assets: Assets | None) -> Assets | None:
        """The calibration: what is given, else the file that is named; refused when there is none and it is needed."""
        if assets is None and self.calibration:
            from ditloom.contracts.assets import read

            assets = read(self.calibration)
        if assets is None and self.needs_calibration:
            from ditloom.contracts.errors import UserError

            key = type(self).__registration__.name
            raise UserError(
                f"{key} needs a calibration of this model: make one with  ditloom calibrate  or name a file with  "
                f"{key}:calibration=FILE"
            )
        return assets


@dataclass(frozen=True, kw_only=True)
class Calibrated(Learned):
    """A method that reads what a plain run of the same model showed."""

    @classmethod
    @abstractmethod
    def from_trace(cls, trace: Any) -> Mapping[str, Tensor]:
        """The tensors to keep, from what plain runs showed; none where they showed too little."""

    @classmethod
    def advice(cls, trace: Any, fitted: Mapping[str, Tensor]) -> Sequence[tuple[str, str]]:
        """How to use what was fitted: methods as a user writes them, and what each does."""
        return ()


def mean_change(now: Tensor, before: Tensor) -> Tensor:
    """Relative L1 difference ``mean|now - before| / mean|before|``, the usual measure of cache decisions."""
    before = before.to(torch.float32)
    return (now.to(torch.float32) - before).abs().mean() / before.abs().mean().clamp_min(1e-12)
