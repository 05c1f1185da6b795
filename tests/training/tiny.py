"""A network and data small enough that a training step takes milliseconds."""

from dataclasses import replace

import torch

from ditloom.backbones.dit import DiTConfig
from ditloom.contracts.condition import Condition
from ditloom.processes.linear import Linear
from ditloom.processes.times import time_sampler
from ditloom.training.config import TrainConfig
from ditloom.training.draws import Draws
from ditloom.training.ema import Power, Ramped
from ditloom.training.feed import StoredFeed
from ditloom.training.launch import World
from ditloom.training.learner import Learner
from ditloom.training.objectives.denoise import Denoise
from ditloom.training.optim import AdamW
from ditloom.training.step import Phase
from ditloom.training.trainer import Trainer

PROCESS = Linear()
CLASSES = 5
SHAPE = (4, 8, 8)
CONFIG = TrainConfig(images=128, batch=8, log_every=16, save_every=10**9)


def network(depth: int = 2, width: int = 32):
    """A DiT with fresh weights, its zero tensors randomised so that every gradient flows."""
    torch.manual_seed(0)
    config = DiTConfig(depth=depth, width=width, heads=2, image_size=8, channels=4, classes=CLASSES, learn_sigma=False)
    model = config.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def feed(count: int = 20, batch: int = 8, seed: int = 0, world: World | None = None, fingerprint: str = "tiny"):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, count, *SHAPE, generator=generator)
    condition = Condition(label=torch.arange(count) % CLASSES)
    null = Condition(label=torch.tensor([CLASSES]))
    world = world or World()
    return StoredFeed(
        list(latents),
        lambda examples, indices: condition.rows(examples),
        null,
        fingerprint,
        batch=batch,
        seed=seed,
        rank=world.rank,
        world_size=world.size,
    )


def learner(config: TrainConfig = CONFIG, world: World | None = None, lr: float = 1e-3, objectives=None, **settings):
    phase = Phase(
        objectives=objectives or {"denoise": Denoise(PROCESS)}, optimiser=AdamW(lr=lr, weight_decay=0.01), clip=1.0
    )
    chosen = {
        "precision": config.precision,
        "parallel": config.parallel,
        "compile": config.compile,
        "checkpointing": config.checkpointing,
        "averages": {"ramped": Ramped(value=0.99), "power-0.1": Power(width=0.1)},
    } | settings
    return Learner({"student": network()}, PROCESS, [phase], world=world, seed=config.seed, **chosen)


def draws(config: TrainConfig = CONFIG):
    return Draws(process=PROCESS, times=time_sampler("logit-normal", stratified=True), seed=config.seed, drop=0.2)


def trainer(run, config: TrainConfig = CONFIG, world: World | None = None, data=None, lr=1e-3, sample=None, **changes):
    config = replace(config, **changes)
    data = data or feed(batch=config.batch, seed=config.seed, world=world)
    built = learner(config, world, lr)
    return Trainer(built, draws(config), data, config, run, sample=sample)


def weights(built: Trainer):
    """Everything that training changed, copied."""
    return {g: {n: t.clone() for n, t in content.items()} for g, content in built.learner.tensors().items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[g][n], b[g][n]) for g in a for n in a[g])


def furthest(a, b) -> float:
    return max(float((a[g][n].double() - b[g][n].double()).abs().max()) for g in a for n in a[g])
