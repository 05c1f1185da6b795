"""Let a model show once what caches that are calibrated need, and keep it with the model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import UseAppendAction

from ditloom.cli.command import Answer, Command, OptionalPath, OptionalText, OptionalWhole, Whole
from ditloom.cli.place import device_of, dtype_of
from ditloom.cli.show import shown_path, table
from ditloom.cli.wanted import check_spec, inputs_of, settings_of
from ditloom.contracts.errors import UserError
from ditloom.contracts.registries import TRAININGS
from ditloom.contracts.registry import register

if TYPE_CHECKING:
    from ditloom.calibration import Circumstances
    from ditloom.contracts.method import Assets
    from ditloom.measure.calibrate import Calibration
    from ditloom.model import Input, Model


@register("calibrate")
@dataclass(frozen=True, kw_only=True)
class Calibrate(Command):
    """Draw some pictures plainly and watch: how much the model's parts change from step to step.

    From that follow TeaCache's polynomial, MagCache's ratios, TaoCache's table and the steps where attention changes
    least. They hold for one model, sampler, number of steps and guidance, and are found again by name.
    """

    model: str
    """a bundled model, a model folder or a hub name"""
    methods: str = ""
    """methods with commas between; unless given, all that a plain run calibrates, or none beside --train"""
    train: UseAppendAction[tuple[str, ...]] = ()
    """learn a timetable in a training, such as harmonica:trajectories=60,target=0.5 or learning-to-cache"""
    prompt: UseAppendAction[tuple[str, ...]] = ()
    """a prompt to draw; may be given again"""
    prompts: OptionalPath = None
    """a text file with one prompt a line"""
    classes: OptionalText = None
    """classes with commas between, or all"""
    count: Whole = 16
    """pictures to draw; unless prompts or classes are given, of what the model was trained on"""
    steps: OptionalWhole = None
    """steps of the sampler; unless given, the model's own number"""
    sampler: OptionalText = None
    """a sampler; unless given, the model's own"""
    guidance: OptionalText = None
    """a guidance scale or rule; unless given, the model's own"""
    size: OptionalText = None
    """side, or HEIGHTxWIDTH, in pixels; unless given, the model's own"""
    seed: Whole = 0
    """decides the noise"""
    batch_size: Whole = 16
    """pictures drawn together"""
    no_sites: bool = False
    """do not watch every attention and feed-forward, for which their outputs of one step are held"""
    dtype: str = "fp32"
    """number format: fp32, bf16 or fp16"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def run(self) -> Answer:
        from ditloom.calibration import Circumstances, keep
        from ditloom.loading import load
        from ditloom.measure.calibrate import chosen

        if self.count < 1 or self.batch_size < 1:
            raise UserError(f"--count and --batch-size are at least 1; got {self.count} and {self.batch_size}")
        keys = chosen(self.methods) if self.methods or not self.train else []
        for spec in self.train:
            check_spec(TRAININGS, spec)
        model = load(self.model, dtype=dtype_of(self.dtype), device=device_of(self.device))
        told = settings_of(model, steps=self.steps, guidance=self.guidance, sampler=self.sampler, size=self.size)
        settings, inputs = {**told, "seed": self.seed}, self._inputs(model)
        now = Circumstances.of(model, model.latent_shape(settings["size"]), settings)
        found = self._watched(model, inputs, settings, keys) if keys else None
        assets = dict(found.assets) if found else {}
        assets |= dict(self._taught(model, inputs, settings, spec) for spec in self.train)
        return self._answer(found, assets, {key: keep(kept, key, now) for key, kept in assets.items()}, now)

    def _watched(self, model: Model, inputs: list[Input], settings: dict[str, Any], keys: list[str]) -> Calibration:
        from ditloom.cli.progress import DrawingProgress
        from ditloom.measure.calibrate import calibrate

        done = 0
        with DrawingProgress(len(inputs), int(settings["steps"]), label="calibrate", quiet=self.json) as bar:

            def follow(pictures: int) -> None:
                nonlocal done
                done += pictures
                bar.follow(done)

            options: Any = {"batch_size": self.batch_size, "sites": not self.no_sites, "on_step": follow}
            return calibrate(model, inputs, settings, keys, **options)

    def _taught(self, model: Model, inputs: list[Input], settings: dict[str, Any], spec: str) -> tuple[str, Assets]:
        from ditloom.cli.progress import RoundsProgress
        from ditloom.measure.calibrate import taught

        with contextlib.ExitStack() as stack:
            bars: list[Any] = []

            def note(done: int, total: int, values: Mapping[str, float]) -> None:
                if not bars:
                    name = spec.partition(":")[0]
                    bars.append(stack.enter_context(RoundsProgress(total, label=name, quiet=self.json)))
                bars[0].update(done, **values)

            return taught(model, inputs, settings, spec, note)

    def _inputs(self, model: Model) -> list[Input]:
        if self.prompt or self.prompts or self.classes:
            given = inputs_of(model, self.prompt, self.prompts, self.classes)
            return [given[i % len(given)] for i in range(max(self.count, len(given)))]
        usual = usual_inputs(model, self.count)
        return [usual[i % len(usual)] for i in range(self.count)]

    def _answer(
        self, found: Calibration | None, assets: dict[str, Assets], written: dict[str, Path], now: Circumstances
    ) -> Answer:
        how = f"--steps {now.steps} --sampler {now.sampler} --guidance {now.guidance}"
        advice = [
            *(found.advice() if found else ()),
            *((key, "the learned timetable") for key in self._trained(assets)),
        ]
        shown: list[Any] = [shown_path(path) for path in written.values()]
        shown += [f"with  {how}  use", table(("--using", "what it does"), advice)]
        document = {
            "files": written,
            "made_for": {key: dict(kept.made_for) for key, kept in assets.items()},
            "tensors": {key: {n: t.tolist() for n, t in kept.tensors.items()} for key, kept in assets.items()},
            "advice": [{"using": using, "what": what} for using, what in advice],
        }
        if found is None:
            return Answer(document, shown)
        from ditloom.measure.calibrate import flat_part

        curves = found.curves()
        flat = {kind: flat_part(curve) for kind, curve in curves.items()}
        rows = [(kind, *(f"{v:.3g}" for v in _spread(c)), "{} to {}".format(*flat[kind])) for kind, c in curves.items()]
        heads = ("change of", "first", "1/4", "1/2", "3/4", "last", "least on steps")
        shown += [table(heads, rows, right=heads[1:6])] if rows else []
        return Answer({**document, "curves": curves, "least": flat}, shown)

    def _trained(self, assets: dict[str, Assets]) -> list[str]:
        return [key for key, kept in assets.items() if "training" in kept.made_for]


def usual_inputs(model: Model, count: int) -> list[Input]:
    """What a model was trained on: its classes in turn, captions spread over its data, or nothing to condition on."""
    from ditloom.conditions.labels import Labels
    from ditloom.conditions.none import Unconditional

    if isinstance(model.conditioner, Labels):
        from ditloom.cli.wanted import classes_of

        return classes_of(model, "all")
    if isinstance(model.conditioner, Unconditional):
        return [None]
    from ditloom.cli.commands.data import source_of

    known = model.info.get("source")
    if known is None:
        raise UserError("the model does not say what it was trained on: give prompts with --prompt or --prompts FILE")
    source = source_of(known)
    rows = [i * len(source) // count for i in range(min(count, len(source)))]
    return [source[i].caption for i in rows]


def _spread(curve: list[float]) -> list[float]:
    """Five values of a curve, from its first to its last."""
    return [curve[round(i * (len(curve) - 1) / 4)] for i in range(5)]
