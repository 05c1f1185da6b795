"""Every registry of the house, by kind; listing them imports nothing heavy."""

from __future__ import annotations

from ditloom.contracts.registry import Registry

BACKBONES = Registry("backbone", "ditloom.backbones")
PROCESSES = Registry("process", "ditloom.processes")
SAMPLERS = Registry("sampler", "ditloom.samplers")
GUIDANCE = Registry("guidance", "ditloom.samplers.guidance")
CONDITIONERS = Registry("conditioner", "ditloom.conditions")
LATENTS = Registry("latent space", "ditloom.latents")
DATA = Registry("data source", "ditloom.data")
METHODS = Registry(
    "method",
    *(f"ditloom.{folder}" for folder in ("caches", "sparsity", "compression", "control", "editing")),
    group="ditloom.methods",
)
TRAININGS = Registry("training of a method", "ditloom.distillation")
ADAPTERS = Registry("adapter", "ditloom.adapters", group="ditloom.adapters")
