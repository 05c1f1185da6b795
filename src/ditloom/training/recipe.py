"""A training run as one YAML file: model, data, training; and everything built from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ditloom.contracts import rng
from ditloom.contracts.backbone import Backbone
from ditloom.contracts.data import DataSource
from ditloom.contracts.errors import UserError
from ditloom.contracts.process import Process
from ditloom.contracts.registries import DATA
from ditloom.contracts.settings import named, parse, registered
from ditloom.data.augment import Augment
from ditloom.data.batches import Batches
from ditloom.loading import assemble, check_state, load
from ditloom.model import Model
from ditloom.processes.times import TIMES, time_sampler
from ditloom.training.config import Spec, TrainConfig, plain, read_settings, read_yaml
from ditloom.training.draws import Draws
from ditloom.training.durable import explained, replace_file
from ditloom.training.ema import PROFILES, Power, Profile
from ditloom.training.feed import Feed, ImageFeed
from ditloom.training.launch import World
from ditloom.training.learner import STUDENT, Learner
from ditloom.training.objectives.denoise import Denoise
from ditloom.training.optim import OPTIMISERS
from ditloom.training.precompute import stored_feed
from ditloom.training.progress import Progress
from ditloom.training.resolve import resolved
from ditloom.training.samples import SampleGrid
from ditloom.training.schedules import SCHEDULES
from ditloom.training.step import Phase
from ditloom.training.trainer import Trainer

TOLD = {"none": None, "labels": "label"}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to learn from: `source` by registry name, and how its pictures reach the network.

    told: "label", "caption" or "nothing" (None: what suits the conditioner). on_error: "refuse" or "skip" a picture
    that cannot be read. augment: flip, shift, scale, fill. wordings: draw one of an example's captions.
    store: a folder for the latents and texts of the whole source, made before training (mirroring only).
    """

    source: Spec
    size: int | None = None
    told: str | None = None
    augment: Mapping[str, Any] = field(default_factory=dict)
    wordings: bool = False
    workers: int = 2
    on_error: str = "refuse"
    store: str | None = None

    def feed(self, config: TrainConfig, world: World, source: DataSource, model: Model, told: str | None) -> Feed:
        """What one process learns from."""
        if self.store is None:
            return ImageFeed(self.batches(config, world, source), model.latents, model.conditioner, told)
        return stored_feed(
            source,
            model.latents,
            model.conditioner,
            self.store,
            told=told,
            batch=config.batch,
            seed=config.seed,
            size=self.size,
            augment=read_settings(Augment, self.augment, "data.augment"),
            wordings=self.wordings,
            world=world,
        )

    def batches(self, config: TrainConfig, world: World, source: DataSource) -> Batches:
        """The loader of one process."""
        return Batches(
            source,
            batch_size=config.batch,
            seed=config.seed,
            augment=read_settings(Augment, self.augment, "data.augment"),
            size=self.size,
            rank=world.rank,
            world_size=world.size,
            workers=self.workers,
            wordings=self.wordings,
            on_error=self.on_error,  # type: ignore[arg-type]
        )


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The grid drawn every `train.sample_every` images: `inputs`, or `count` of the source's classes or captions."""

    inputs: tuple[Any, ...] = ()
    count: int = 16
    columns: int | None = None
    steps: int | None = None
    guidance: Any = None
    sampler: Any = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """model: "backbone", "process", "latents", "conditioner" and optionally "sampling" and "info", as in a model's
    config.json; a backbone may also be a published name, or a mapping with "preset" and changes. What the data and the
    latent space decide (channels, size, classes) may be left out. start: a model (bundled name, folder or hub id) whose
    weights the network begins with, instead of fresh ones.
    """

    model: Mapping[str, Any]
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
    start: str | None = None

    @classmethod
    def from_dict(cls, values: Any) -> Recipe:
        """A recipe from plain values."""
        if not isinstance(values, Mapping):
            raise UserError(f"a recipe holds the parts model, data and train; got {values!r}")
        sections = {"data": DataConfig, "train": TrainConfig, "samples": SampleConfig}
        parts = {k: read_settings(sections[k], v, k) if k in sections else v for k, v in values.items()}
        for part in ("model", "data"):
            if part not in parts:
                raise UserError(f"the recipe has no part {part!r}: it needs model, data and train")
        return read_settings(cls, parts, "the recipe")

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """A recipe from a YAML file."""
        return cls.from_dict(read_yaml(Path(path)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` is its inverse."""
        return plain(asdict(self))

    def save(self, run: Path) -> None:
        """Write the resolved recipe into the run folder."""
        import yaml

        path = run / "recipe.yaml"
        with explained("write", path):
            run.mkdir(parents=True, exist_ok=True)
            replace_file(path, [yaml.safe_dump(self.to_dict(), sort_keys=False).encode()])

    def source(self) -> DataSource:
        """The data source."""
        return registered(DATA, self.data.source)

    def build_model(self, source: DataSource) -> Model:
        """The model with fresh weights, which follow from the seed, or with those it starts from."""
        config = resolved(self.model, source, self.data.size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.key(self.train.seed, "init"))
            model = assemble(config)
        if self.start is not None:
            begin_from(model.backbone, load(self.start).backbone, self.start)
        return model

    def trainer(
        self,
        run: str | Path,
        world: World | None = None,
        *,
        progress: Callable[..., Progress] = Progress,
    ) -> tuple[Trainer, Model]:
        """Everything built and ready to train; the model's backbone is the network that learns."""
        world, config = world or World(), self.train
        source = self.source()
        model = self.build_model(source)
        model.latents.eval().requires_grad_(False).to(world.device)
        told = self.told(model)
        feed = self.data.feed(config, world, source, model, told)
        learner = learner_of(model.backbone, model.process, config, world)
        draws = draws_of(model.process, config)
        grid = self.grid(model, source, told) if config.sample_every else None
        state = {"model": plain(model.config()), "recipe": self.to_dict()}
        trainer = Trainer(learner, draws, feed, config, Path(run), sample=grid, state=state, progress=progress)
        return trainer, model

    def told(self, model: Model) -> str | None:
        """What the conditioner hears of each example."""
        if self.data.told is not None:
            return None if self.data.told == "nothing" else self.data.told
        return TOLD.get(type(model.conditioner).__registration__.name, "caption")

    def grid(self, model: Model, source: DataSource, told: str | None) -> SampleGrid:
        """The sample grid of this recipe."""
        settings = {k: getattr(self.samples, k) for k in ("steps", "guidance", "sampler", "seed")}
        inputs = list(self.samples.inputs) or default_inputs(source, told, self.samples.count)
        return SampleGrid(model, inputs, settings, self.samples.columns)


def begin_from(network: Backbone, other: Backbone, name: str) -> None:
    """Give a network the weights of another; what does not fit is named."""
    state = network.grown_from(other)
    check_state(network.state_dict(), state, f"starting from {name}: the backbone")
    network.load_state_dict(dict(state), strict=True)


def default_inputs(source: DataSource, told: str | None, count: int) -> list[Any]:
    """Classes in turn, captions spread over the source, or nothing."""
    if told == "label":
        return [i % len(source.info.classes or (0,)) for i in range(count)]
    if told == "caption":
        return [source[i * len(source) // count].caption for i in range(count)]
    return [None] * count


def learner_of(network: Backbone, process: Process, config: TrainConfig, world: World) -> Learner:
    """A learner that trains a backbone to denoise."""
    phase = Phase(
        objectives={"denoise": Denoise(process)},
        optimiser=named("optimiser", OPTIMISERS, config.optimiser),
        schedule=named("schedule", SCHEDULES, config.schedule),
        clip=config.clip,
    )
    return Learner(
        {STUDENT: network},
        process,
        [phase],
        world=world,
        seed=config.seed,
        precision=config.precision,
        parallel=config.parallel,
        compile=config.compile,
        checkpointing=config.checkpointing,
        averages=averages_of(config),
    )


def averages_of(config: TrainConfig) -> dict[str, Profile]:
    """The moving averages by a name of their own; the first is the one that is sampled from and kept."""
    found: dict[str, Profile] = {}
    for spec in config.averages:
        profile = named("average", PROFILES, spec)
        name = parse(spec)[0] if isinstance(spec, str) else spec["name"]
        name = f"{name}-{profile.width}" if isinstance(profile, Power) else name
        found[name if name not in found else f"{name}-{len(found)}"] = profile
    return found


def draws_of(process: Process, config: TrainConfig) -> Draws:
    """Noise, noise levels and dropout for a process under a configuration."""
    spec = config.times if config.times is not None else type(process).times
    times = time_sampler(named("time distribution", TIMES, spec), config.shift, config.stratified)
    return Draws(process=process, times=times, seed=config.seed, drop=config.drop)
