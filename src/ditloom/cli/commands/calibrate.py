"""Let a model show once what caches that are calibrated need, and keep it with the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import UseAppendAction

from ditloom.cli.command import Answer, Command, OptionalPath, OptionalText, OptionalWhole, Whole
from ditloom.cli.place import device_of, dtype_of
from ditloom.cli.show import shown_path, table
from ditloom.cli.wanted import inputs_of, settings_of
from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register

if TYPE_CHECKING:
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
    """methods with commas between; unless given, all that are calibrated"""
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
        from ditloom.calibration import keep
        from ditloom.cli.progress import DrawingProgress
        from ditloom.measure.calibrate import calibrate, chosen
        from ditloom.model import load

        if self.count < 1 or self.batch_size < 1:
            raise UserError(f"--count and --batch-size are at least 1; got {self.count} and {self.batch_size}")
        keys = chosen(self.methods)
        model = load(self.model, dtype=dtype_of(self.dtype), device=device_of(self.device))
        told = settings_of(model, steps=self.steps, guidance=self.guidance, sampler=self.sampler, size=self.size)
        settings = {**told, "seed": self.seed}
        inputs, done = self._inputs(model), 0
        with DrawingProgress(len(inputs), int(settings["steps"]), label="calibrate", quiet=self.json) as bar:

            def follow(pictures: int) -> None:
                nonlocal done
                done += pictures
                bar.follow(done)

            options: Any = {"batch_size": self.batch_size, "sites": not self.no_sites, "on_step": follow}
            found = calibrate(model, inputs, settings, keys, **options)
        written = {key: keep(assets, key, found.circumstances) for key, assets in found.assets.items()}
        return self._answer(found, written)

    def _inputs(self, model: Model) -> list[Input]:
        if self.prompt or self.prompts or self.classes:
            given = inputs_of(model, self.prompt, self.prompts, self.classes)
            return [given[i % len(given)] for i in range(max(self.count, len(given)))]
        usual = usual_inputs(model, self.count)
        return [usual[i % len(usual)] for i in range(self.count)]

    def _answer(self, found: Calibration, written: dict[str, Path]) -> Answer:
        from ditloom.measure.calibrate import flat_part

        now, curves = found.circumstances, found.curves()
        how = f"--steps {now.steps} --sampler {now.sampler} --guidance {now.guidance}"
        shown: list[Any] = [shown_path(path) for path in written.values()]
        shown.append(f"with  {how}  use")
        shown.append(table(("--using", "what it does"), list(found.advice())))
        flat = {kind: flat_part(curve) for kind, curve in curves.items()}
        rows = [
            (kind, *(f"{v:.3g}" for v in _spread(curve)), "{} to {}".format(*flat[kind]))
            for kind, curve in curves.items()
        ]
        heads = ("change of", "first", "1/4", "1/2", "3/4", "last", "least on steps")
        if rows:
            shown.append(table(heads, rows, right=heads[1:6]))
        document = {
            "files": written,
            "made_for": {key: dict(assets.made_for) for key, assets in found.assets.items()},
            "tensors": {k: {n: t.tolist() for n, t in a.tensors.items()} for k, a in found.assets.items()},
            "advice": [{"using": using, "what": what} for using, what in found.advice()],
            "curves": curves,
            "least": flat,
        }
        return Answer(document, shown)


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
