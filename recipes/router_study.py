"""Do learned routers beat uniform and random masks of equal MACs?

    OMP_NUM_THREADS=1 python recipes/router_study.py --model fashion

Trains HarmoniCa's and Learning-to-Cache's routers for a sampler, steps and guidance, then draws pictures of other seeds
with masks that compute the same share of the sub-modules' MACs: learned, uniform (FORA) and random (five of them). The
number is the PSNR of the latents to the plain run's, over all pictures. Prints a table and JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor

from ditloom.caches.routers import SCORES, MaskedCache, computed, costs_of, threshold_of
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
    harmonica: str = "harmonica:trajectories=80"
    learning_to_cache: str = "learning-to-cache:iterations=400"
    intervals: tuple[int, ...] = (2, 3)
    """of the uniform masks, whose shares the others are given"""


def uniform(steps: int, sites: int, interval: int) -> Tensor:
    """FORA's mask."""
    full = [s == 0 or (steps - 1 - s) % interval == 0 for s in range(steps)]
    return torch.tensor(full)[:, None].expand(-1, sites).clone()


def share_of(mask: Tensor, costs: Tensor) -> float:
    """Share of the sub-modules' MACs that a mask computes."""
    return float((mask * costs).sum() / (costs.sum() * len(mask)))


def drawn(model: Model, inputs: list[Input], settings: dict[str, Any], mask: Tensor | None) -> Tensor:
    """Latents of the pictures under a mask."""
    using = [] if mask is None else [MaskedCache("mask", mask)]
    told = {key: settings[key] for key in ("steps", "sampler", "guidance")}
    return model.generate(inputs, seed=SEED, using=using, **told).latents


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
    print(json.dumps({"model": study.model, "settings": settings, "trainings": trainings, "rows": rows}))


if __name__ == "__main__":
    main(tyro.cli(Study))
