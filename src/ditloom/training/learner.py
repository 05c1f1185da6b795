"""Networks, objectives, optimisers and averages: learns from one global batch at a time, saves and loads itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditloom.contracts import rng
from ditloom.contracts.backbone import Backbone
from ditloom.contracts.errors import UserError
from ditloom.contracts.objective import TrainBatch
from ditloom.contracts.process import Process
from ditloom.sites.compiling import compile_blocks
from ditloom.training.draws import moved
from ditloom.training.ema import Profile, Track, local
from ditloom.training.launch import World
from ditloom.training.optim import clip_gradients, load_state, set_rate, state_tensors
from ditloom.training.parallel import gathered, like, parallelised
from ditloom.training.precision import precision_of
from ditloom.training.step import Phase, TrainStep

STUDENT = "student"
Groups = dict[str, dict[str, Tensor]]


@dataclass
class Tally:
    """Sums and counts of logged values since they were last read."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take in values, [B] or scalar."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double().sum()
            self.counts[name] = self.counts.get(name, 0) + value.numel()

    def means(self, world: World) -> dict[str, float]:
        """The means over all processes; starts again from nothing."""
        names = sorted(self.sums)
        table = torch.zeros(2, len(names), dtype=torch.float64)
        for column, name in enumerate(names):
            table[0, column], table[1, column] = self.sums[name].cpu(), self.counts[name]
        sums, counts = world.sum(table)
        self.sums, self.counts = {}, {}
        return dict(zip(names, (sums / counts).tolist(), strict=True))


class Learner:
    """One global batch in, weights changed. The order of preparation: checkpointing, compilation, sharding."""

    def __init__(
        self,
        roles: Mapping[str, Backbone],
        process: Process,
        phases: Sequence[Phase],
        *,
        world: World | None = None,
        seed: int = 0,
        precision: str = "fp32",
        parallel: str = "auto",
        compile: bool = False,
        checkpointing: bool = False,
        averages: Mapping[str, Profile] | None = None,
    ):
        self.world, self.seed, self.phases = world or World(), seed, phases
        self.step = TrainStep(roles, process, phases)
        if any(tensor.device != self.world.device for tensor in self.step.state_dict().values()):
            self.step.to(self.world.device)
        for network in roles.values():
            network.checkpointing = checkpointing
            if compile:
                compile_blocks(network)
        self.parallel = parallelised(parallel, self.step, self.world, precision_of(precision).compute)
        self.masters = self.parallel.masters
        self.trained = {phase.name: self._trained(phase) for phase in phases}
        self.optimisers = {phase.name: phase.optimiser.build(self.trained[phase.name]) for phase in phases}
        student = {name: master for name, master in self._role(STUDENT).items() if master.requires_grad}
        self.tracks = {name: Track(profile, student) for name, profile in (averages or {}).items()}
        self.tally = Tally()
        self._focused: str | None = None

    def learn(self, micro: Sequence[TrainBatch], first: int, size: int) -> None:
        """Learn from this process's micro-batches of the global batch of `size` images that starts at image `first`."""
        batches = [moved(batch, self.world.device) for batch in micro]
        for phase in self.phases:
            if phase.due(first, size):
                self._focus(phase)
                self._gradients(phase, batches, first, size)
                self._update(phase, first + size)
        for track in self.tracks.values():
            track.update(first + size, size)

    def _gradients(self, phase: Phase, batches: Sequence[TrainBatch], first: int, size: int) -> None:
        """Gradients of the mean loss over the global batch; wrappers average over processes, so sums are scaled up."""
        coefficients = phase.coefficients(first)
        self.masters.forget_gradients()
        for number, batch in enumerate(batches, start=1):
            self._seed(batch)
            with self.parallel.accumulating(last=number == len(batches)):
                losses, logs = self.parallel.module(batch, phase.name, coefficients)
                (losses.sum() * (self.world.size / size)).backward()
            self.masters.collect()
            prefix = "" if len(self.phases) == 1 else f"{phase.name}."
            self.tally.add({f"{prefix}{name}": value for name, value in {"loss": losses.detach(), **logs}.items()})

    def _update(self, phase: Phase, seen: int) -> None:
        trained, optimiser = self.trained[phase.name], self.optimisers[phase.name]
        if phase.clip is not None:
            self.tally.add({"gradient": clip_gradients(trained.values(), phase.clip)})
        set_rate(optimiser, phase.optimiser.lr * phase.schedule.factor(seen))
        optimiser.step()
        self.masters.publish()

    def _seed(self, batch: TrainBatch) -> None:
        """Dropout inside a network draws from the global generator, which so follows from the image too."""
        torch.manual_seed(rng.key(self.seed, "network", batch.indices[0] if batch.indices else 0))

    def _trained(self, phase: Phase) -> dict[str, torch.nn.Parameter]:
        names = self.step.trained_by(phase)
        found = {name: master for name, master in self.masters.trained.items() if name in names}
        if not found:
            raise UserError(f"phase {phase.name!r} trains no parameter: no name matches {list(phase.trained)}")
        return found

    def _focus(self, phase: Phase) -> None:
        """Only what a phase trains gets gradients."""
        if self._focused == phase.name:
            return
        for name, parameter in self.step.named_parameters():
            parameter.requires_grad_(name in self.trained[phase.name])
        self._focused = phase.name

    def _role(self, role: str) -> dict[str, torch.nn.Parameter]:
        prefix = f"roles.{role}."
        return {n.removeprefix(prefix): p for n, p in self.masters.named.items() if n.startswith(prefix)}

    def _live(self) -> Groups:
        """Every tensor that makes up this learner, by group, as it is held here (whole or in shards)."""
        groups: Groups = {}
        for role, network in self.step.networks.items():
            name = "model" if role == STUDENT else f"role-{role}"
            groups[name] = {**self._role(role), **persistent_buffers(network)}
        heads: dict[str, Tensor] = {n: p for n, p in self.masters.named.items() if n.startswith("objectives.")}
        heads |= {f"objectives.{n}": b for n, b in persistent_buffers(self.step.objectives).items()}
        if heads:
            groups["heads"] = heads
        return groups | {f"average-{name}": track.averages for name, track in self.tracks.items()}

    def tensors(self) -> Groups:
        """All state as whole tensors by group, on the leader; every process must call it."""
        groups = self._live()
        for phase in self.phases:
            state = state_tensors(self.optimisers[phase.name], self.trained[phase.name])
            groups[f"optimiser-{phase.name}"] = state
        return {group: gathered(content, self.world) for group, content in groups.items()}

    @torch.no_grad()
    def load(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from saved tensors; missing, extra or mis-shaped ones are refused by name."""
        live = self._live()
        for group, content in live.items():
            check_match(group, saved.get(group, {}), content)
            for name, tensor in content.items():
                tensor.copy_(like(saved[group][name], tensor))
        for phase in self.phases:
            trained = self.trained[phase.name]
            state = saved.get(f"optimiser-{phase.name}", {})
            sharded = {key: like(value, trained[key.rsplit(".", 1)[0]]) for key, value in state.items()}
            load_state(self.optimisers[phase.name], trained, sharded)
        self.masters.publish()

    def is_sane(self) -> bool:
        """Whether everything logged here since the last reading is a number."""
        return all(bool(torch.isfinite(total)) for total in self.tally.sums.values())

    @property
    def rate(self) -> float:
        """The learning rate of the first phase's last step."""
        group = self.optimisers[self.phases[0].name].param_groups[0]
        return float(group["lr"] / group["scale"])

    def is_finite(self) -> bool:
        """Whether every weight is a number; agreed on by all processes."""
        bad = any(not bool(torch.isfinite(local(p.detach())).all()) for p in self.masters.named.values())
        return not self.world.any(bad)

    @contextlib.contextmanager
    @torch.no_grad()
    def averaged(self, name: str | None) -> Iterator[Backbone]:
        """The student in evaluation mode with the weights of an average (None: its own), put back afterwards."""
        network = self.step.networks[STUDENT]
        parameters = dict(network.named_parameters())
        averages = self.tracks[name].averages if name is not None else {}
        before = {key: local(parameters[key]).clone() for key in averages}
        for key, value in averages.items():
            local(parameters[key]).copy_(local(value))
        network.eval()
        try:
            with self.parallel.callable_anywhere(), torch.compiler.set_stance("force_eager"):
                yield network
        finally:
            network.train()
            for key, value in before.items():
                local(parameters[key]).copy_(value)


def persistent_buffers(module: torch.nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the state of a module."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in parameters}


def check_match(group: str, saved: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    """Refuse tensors that do not fit, naming the first of each fault."""
    faults = [f"{name} is missing" for name in live if name not in saved][:1]
    faults += [f"{name} is not known here" for name in saved if name not in live][:1]
    faults += [
        f"{name} has shape {list(saved[name].shape)} there and {list(live[name].shape)} here"
        for name in live
        if name in saved and saved[name].shape != live[name].shape
    ][:1]
    if faults:
        raise UserError(f"the checkpoint's {group!r} does not fit this model: {'; '.join(faults)}")
