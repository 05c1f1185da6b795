"""Do learned routers beat uniform and random masks of equal MACs?

    OMP_NUM_THREADS=1 python recipes/router_study.py --model fashion

Trains HarmoniCa's and Learning-to-Cache's routers for a sampler, steps and guidance, then draws pictures of other seeds
with masks that compute the same share of the sub-modules' MACs: learned, uniform (FORA) and random (five of them). The
number is the PSNR of the latents to the plain run's, over all pictures. `--whole-steps` adds every mask of the same
share that computes a step whole or not at all: how good a mask there is. Prints a table and JSON.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor

from ditloom.caches.routers import SCORES, MaskedCache, computed, costs_of, share_of, threshold_of
from ditloom.contracts.registries import TRAININGS
from ditloom.contracts.settings import registered
from ditloom.data.fashion_mnist import CLASSES
from ditloom.distillation.setting import Setting
from ditloom.loading import load
from ditloom.measure.fidelity import latent_psnr
from ditloom.model import Input, Model

SEED = 5


@dataclass(frozen=True)
class Study:
    """What is trained and how it is judged."""

    model: str = "fashion"
    steps: int = 10
    sampler: str = "euler"
    pictures: int = 50
    harmonica: str = "harmonica:trajectories=80,target=0.6"
    learning_to_cache: str = "learning-to-cache:iterations=400,target=0.6"
    intervals: tuple[int, ...] = (2, 3)
    """of the uniform masks, whose shares the others are given"""
    whole_steps: bool = False
    """also try all masks of whole steps, and show the best and the rank of the uniform one"""


def uniform(steps: int, sites: int, interval: int) -> Tensor:
    """FORA's mask."""
    full = [s == 0 or (steps - 1 - s) % interval == 0 for s in range(steps)]
    return torch.tensor(full)[:, None].expand(-1, sites).clone()


def whole_steps(steps: int, sites: int, full: int) -> Iterator[Tensor]:
    """Every mask that computes `full` steps whole, the first among them, and the others not at all."""
    for chosen in itertools.combinations(range(1, steps), full - 1):
        rows = torch.zeros(steps, dtype=torch.bool)
        rows[[0, *chosen]] = True
        yield rows[:, None].expand(-1, sites).clone()


def drawn(model: Model, inputs: list[Input], settings: dict[str, Any], mask: Tensor | None) -> Tensor:
    """Latents of the pictures under a mask."""
    using = [] if mask is None else [MaskedCache("mask", mask)]
    told = {key: settings[key] for key in ("steps", "sampler", "guidance")}
    return model.generate(inputs, seed=SEED, using=using, **told).latents


def ranked(even: Tensor, share: float, judge: Callable[[Tensor], float]) -> dict[str, Any]:
    """The best mask of whole steps that computes as many as the uniform one, and the uniform one's rank."""
    found = sorted(
        ((judge(mask), mask) for mask in whole_steps(*even.shape, int(even[:, 0].sum()))), key=lambda f: f[0]
    )
    own, (value, mask) = judge(even), found[-1]
    rank = 1 + sum(other > own for other, _ in found)
    name = f"best whole steps {mask[:, 0].nonzero().flatten().tolist()}"
    print(f"{share:.3f}  {name} {value:.2f} dB; uniform is {rank} of {len(found)}", flush=True)
    return {"mask": name, "budget": share, "share": share, "psnr": value, "rank of uniform": rank}


def main(study: Study) -> None:
    """Train, draw, print."""
    model = load(study.model)
    settings = model.settings(steps=study.steps, sampler=study.sampler)
    inputs: list[Input] = [i % len(CLASSES) for i in range(study.pictures)]
    setting = Setting(model, settings, list(range(len(CLASSES))))
    costs, sites = costs_of(setting.surface), len(setting.surface.submodules)
    trainings = {"harmonica": study.harmonica, "learning-to-cache": study.learning_to_cache}
    learned = {name: registered(TRAININGS, spec).train(setting)[SCORES] for name, spec in trainings.items()}
    plain = drawn(model, inputs, settings, None)
    rows = []
    for interval in study.intervals:
        mask = uniform(study.steps, sites, interval)
        share = share_of(mask, costs)
        masks = {f"uniform, every {interval}": mask}
        for name, scores in learned.items():
            if name == "harmonica" or share >= 0.5:
                masks[name] = computed(scores.clone(), threshold_of(scores, share + 1e-9, costs))
        for seed in range(5):
            scores = torch.rand(study.steps, sites, generator=torch.Generator().manual_seed(seed))
            masks[f"random {seed}"] = computed(scores, threshold_of(scores, share + 1e-9, costs))
        for name, chosen in masks.items():
            value = latent_psnr(drawn(model, inputs, settings, chosen), plain)
            rows.append({"mask": name, "budget": share, "share": share_of(chosen, costs), "psnr": value})
            print(f"{share:.3f}  {name:20} {rows[-1]['share']:.3f}  {value:.2f} dB", flush=True)
        if study.whole_steps:
            rows.append(ranked(mask, share, lambda m: latent_psnr(drawn(model, inputs, settings, m), plain)))
    print(json.dumps({"model": study.model, "settings": settings, "trainings": trainings, "rows": rows}))


if __name__ == "__main__":
    main(tyro.cli(Study))
