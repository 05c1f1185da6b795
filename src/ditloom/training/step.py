"""What DDP or FSDP2 wraps: networks and objectives in one module, a batch in, per-sample losses out."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.errors import UnknownName
from ditloom.contracts.objective import Objective, TrainBatch
from ditloom.contracts.process import Process
from ditloom.training.observe import Observer
from ditloom.training.optim import Adam, AdamW
from ditloom.training.schedules import Constant, Schedule

Losses = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One optimiser's work: which network it trains, by which objectives, and when.

    role: the network; trained: patterns of its parameters' names, all by default (heads of the objectives always
    are). It runs at every `every`-th batch from image `start` until image `stop`.
    """

    name: str = "main"
    role: str = "student"
    objectives: Mapping[str, Objective]
    trained: Sequence[str] = ("*",)
    optimiser: Adam = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Constant)
    clip: float | None = None
    every: int = 1
    start: int = 0
    stop: int | None = None

    def due(self, images: int, batch: int) -> bool:
        """Whether it runs on the global batch that starts at `images`."""
        inside = self.start <= images and (self.stop is None or images < self.stop)
        return inside and (images - self.start) // batch % self.every == 0

    def coefficients(self, images: int) -> dict[str, float]:
        """The weight of each objective that is on."""
        weights = {name: objective.coefficient(images) for name, objective in self.objectives.items()}
        return {name: weight for name, weight in weights.items() if weight != 0}


class TrainStep(nn.Module):
    """All trained networks (by role) and all objectives: ``step(batch, phase, coefficients) -> losses, logs``.

    losses [B] is the weighted sum of the objectives named in `coefficients`; those not named are not run, nor are
    their captures taken. logs: detached values, [B] or scalar, by name.
    """

    def __init__(self, roles: Mapping[str, Backbone], process: Process, phases: Sequence[Phase]):
        super().__init__()
        self.roles = nn.ModuleDict(roles)
        self.networks = dict(roles)
        self.observers = {name: Observer(network) for name, network in roles.items()}
        self.process = process
        self.phases = {phase.name: phase for phase in phases}
        self.objectives = nn.ModuleDict({p.name: nn.ModuleDict(p.objectives) for p in phases})
        for phase in phases:
            if phase.role not in roles:
                raise UnknownName("role", phase.role, roles)

    def forward(self, batch: TrainBatch, phase: str, coefficients: Mapping[str, float]) -> Losses:
        now, process = self.phases[phase], self.process
        active = {name: now.objectives[name] for name in coefficients}
        taps = list(dict.fromkeys(tap for objective in active.values() for tap in objective.captures()))
        x = process.scale_input(process.add_noise(batch.x, batch.noise, batch.t), batch.t)
        observe = self.observers[now.role]
        prediction, captured = observe(x, process.network_time(batch.t), batch.condition, taps)
        prediction = prediction.float()
        total, logs = prediction.new_zeros(len(batch.x)), {}
        for name, objective in active.items():
            losses, values = objective(batch, prediction, captured)
            total = total + coefficients[name] * losses
            logs[name] = losses.detach()
            logs |= {f"{name}.{key}": value.detach() for key, value in values.items()}
        return total, logs

    def trained_by(self, phase: Phase) -> set[str]:
        """Names of the parameters a phase trains."""
        network, heads = f"roles.{phase.role}.", f"objectives.{phase.name}."
        return {
            name
            for name, _ in self.named_parameters()
            if name.startswith(heads)
            or (name.startswith(network) and _matches(name.removeprefix(network), phase.trained))
        }


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
