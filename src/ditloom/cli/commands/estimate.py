"""Estimate the memory and time of a training run or of drawing, before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional, UseAppendAction

from ditloom.cli.command import Answer, Command, OptionalPath, OptionalText, OptionalWhole, Whole
from ditloom.cli.place import device_of, dtype_of
from ditloom.cli.wanted import settings_of
from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register


@register("estimate")
@dataclass(frozen=True, kw_only=True)
class Estimate(Command):
    """Given a recipe, estimate training; given --model, estimate drawing with it.

    Memory is found by a simulation, time by a few real steps on this machine (--probe 0: none).
    """

    recipe: Positional[OptionalPath] = None
    """a training recipe"""
    set: UseAppendAction[tuple[str, ...]] = ()
    """a setting in place of the recipe's, such as train.batch=64"""
    processes: Whole = 1
    """processes that will train together"""
    model: OptionalText = None
    """the model to draw with"""
    count: Whole = 1
    """pictures to draw"""
    batch_size: Whole = 32
    """pictures drawn together"""
    steps: OptionalWhole = None
    """steps of the sampler; unless given, the model's own number"""
    guidance: OptionalText = None
    """a guidance scale or rule; unless given, the model's own"""
    sampler: OptionalText = None
    """a sampler; unless given, the model's own"""
    size: OptionalText = None
    """side, or HEIGHTxWIDTH, in pixels; unless given, the model's own"""
    using: UseAppendAction[tuple[str, ...]] = ()
    """a method such as NAME:KEY=VALUE"""
    dtype: str = "fp32"
    """number format for drawing: fp32, bf16 or fp16"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    probe: Whole = 3
    """real training steps to time; 0 runs nothing, for drawing neither"""

    def run(self) -> Answer:
        if (self.recipe is None) == (self.model is None):
            raise UserError("estimate takes either a training recipe or --model NAME")
        if self.probe < 0 or self.processes < 1:
            raise UserError(f"--probe is at least 0 and --processes at least 1; got {self.probe} and {self.processes}")
        from ditloom.cli.machine import memory_free

        device = device_of(self.device)
        found = self._drawing(device) if self.recipe is None else self._training(self.recipe, device)
        free = memory_free(device)
        told = list(found.lines())
        if free is not None:
            fits = "fits" if found.memory <= free else "does NOT fit"
            told.append(f"{fits} into the {free / 1e6:,.0f} MB that are free")
        return Answer({**found.to_dict(), "device": device, "memory_free": free}, told)

    def _training(self, path: Path, device: str) -> Any:
        from ditloom.cli.commands.train import recipe_of
        from ditloom.contracts.registries import PROCESSES
        from ditloom.contracts.settings import registered
        from ditloom.presets import backbone_config
        from ditloom.training.estimate import estimate
        from ditloom.training.resolve import resolved

        recipe = recipe_of(path, self.set)
        config = resolved(recipe.model, recipe.source(), recipe.data.size)
        return estimate(
            backbone_config(config["backbone"]),
            registered(PROCESSES, config["process"]),
            recipe.train,
            device=device.partition(":")[0],
            processes=self.processes,
            probe=self.probe,
        )

    def _drawing(self, device: str) -> Any:
        from ditloom.cli.bulk import Order
        from ditloom.cli.generate_estimate import estimate_generate
        from ditloom.loading import load

        model = load(str(self.model), dtype=dtype_of(self.dtype), device=device)
        settings = settings_of(
            model,
            steps=self.steps,
            guidance=self.guidance,
            sampler=self.sampler,
            size=self.size,
            using=self.using,
        )
        order = Order(inputs=[None], each=self.count, batch_size=self.batch_size)
        return estimate_generate(model, order, settings, probe=self.probe > 0)
