"""Draw pictures from prompts or classes, one or a million."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional, UseAppendAction

from ditloom.cli.command import Answer, Command, OptionalPath, OptionalText, OptionalWhole, Whole
from ditloom.cli.place import Share, device_of, dtype_of, share
from ditloom.cli.show import say, shown_path
from ditloom.cli.wanted import inputs_of, seeds_of, settings_of
from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register

if TYPE_CHECKING:
    from ditloom.cli.bulk import Group, Order
    from ditloom.cli.run_folder import RunFolder
    from ditloom.model import Model
    from ditloom.sites.report import Report

LISTED = 1000
ON_GRID = 100


@register("generate")
@dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Draw pictures from prompts or classes, into a folder with a grid and the settings of every picture.

    Picture i follows from (seed, i). A run that was interrupted goes on where it stopped when it is given the same
    folder and options, and `torchrun` shares it among processes:
    torchrun --nproc-per-node 4 --no-python ditloom generate --count 50000 --classes all --out many
    """

    prompt: Positional[tuple[str, ...]] = ()
    """what to draw, a picture each; "" draws without a condition"""
    model: str = "emoji"
    """a bundled model, a model folder or a hub name"""
    classes: OptionalText = None
    """classes in place of prompts: names or numbers with commas between, or all"""
    prompts: OptionalPath = None
    """a text file with a prompt a line, in place of prompts"""
    negative: OptionalText = None
    """what guidance leads away from"""
    count: OptionalWhole = None
    """pictures for each seed, the inputs taken in turn; unless given, one for each input"""
    seed: Whole = 0
    """decides the noise"""
    seeds: OptionalText = None
    """several seeds, such as 0,7,12 or 0-15: every picture with each"""
    steps: OptionalWhole = None
    """steps of the sampler; unless given, the model's own number"""
    guidance: OptionalText = None
    """a guidance scale, or a rule such as cfg:scale=3; unless given, the model's own"""
    sampler: OptionalText = None
    """a sampler such as ddim or sde:norm=0.5; unless given, the model's own"""
    using: UseAppendAction[tuple[str, ...]] = ()
    """a method such as NAME:KEY=VALUE"""
    size: OptionalText = None
    """side, or HEIGHTxWIDTH, in pixels; unless given, the model's own"""
    batch_size: Whole = 32
    """pictures drawn together"""
    out: OptionalPath = None
    """the folder to write; unless given, a new one below out/"""
    grid: OptionalWhole = None
    """columns of the grid of the first 100 pictures; 0 makes none"""
    dtype: str = "fp32"
    """fp32, bf16 or fp16"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    compile: bool = False
    """compile the model's blocks first: slower to start, then faster"""

    def run(self) -> Answer:
        from ditloom.cli.bulk import draw, missing
        from ditloom.cli.grid import check_columns
        from ditloom.cli.progress import DrawingProgress
        from ditloom.cli.run_folder import RunFolder

        check_columns(self.grid)
        mine, model = share(), self._model()
        order = self._order(model)
        settings = self._settings(model, order)
        folder = RunFolder(self._folder(mine), order.total)
        record = self._record(model, order, settings)
        folder.claim(record)
        start, groups = time.monotonic(), missing(folder, order, mine)
        own, drawn = order.pictures(mine), sum(len(group.numbers) for group in groups)
        bar = DrawingProgress(own, settings["steps"], found=own - drawn, quiet=not mine.leads)
        with _told_on_stop(folder), bar:
            report = draw(folder, model, groups, settings, _Notes(record["pictures"]), bar.follow)
        work = _Work(drawn, own - drawn, time.monotonic() - start, report)
        self._finish(folder, order, record, work, mine)
        return self._answer(folder, order, record, work, mine)

    def _model(self) -> Model:
        from ditloom.loading import load

        dtype, device = dtype_of(self.dtype), device_of(self.device, share().local_rank)
        model = load(self.model, dtype=dtype, device=device)
        return model.compile(frozen=True) if self.compile else model

    def _order(self, model: Model) -> Order:
        from ditloom.cli.bulk import Order

        inputs = inputs_of(model, self.prompt, self.prompts, self.classes)
        each = len(inputs) if self.count is None else self.count
        return Order(inputs=inputs, each=each, seeds=seeds_of(self.seeds, self.seed), batch_size=self.batch_size)

    def _settings(self, model: Model, order: Order) -> dict[str, Any]:
        """What `Model.generate` is told, everything resolved; one batch is prepared so that mistakes show now."""
        settings = settings_of(
            model,
            steps=self.steps,
            guidance=self.guidance,
            sampler=self.sampler,
            size=self.size,
            negative=self.negative,
            using=self.using,
        )
        with warnings.catch_warnings(action="ignore"):
            batch = model.batch(order.inputs[:1], [0], {**settings, "seed": 0}, self.negative, self.using)
            batch.drawing.check(model.surface(batch.shape).layout, batch.steps_total)
        return settings

    def _folder(self, mine: Share) -> Path:
        if self.out is not None:
            return self.out.expanduser()
        if mine.size > 1:
            raise UserError("several processes need one folder to write: give --out FOLDER")
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{Path(self.model).name}"
        taken = [path.name for path in Path("out").glob(f"{name}*")]
        return Path("out") / (f"{name}-{len(taken) + 1}" if taken else name)

    def _record(self, model: Model, order: Order, settings: Mapping[str, Any]) -> dict[str, Any]:
        """settings.json: what decides the pictures, and with what they were made."""
        import torch

        import ditloom
        from ditloom.measure.drawing import model_hash

        listed = json.dumps(list(order.inputs)).encode()
        pictures = {
            "model": model.info.get("name") or Path(self.model).name,
            "weights": model_hash(model),
            **settings,
            "seeds": list(order.seeds),
            "count": order.each,
            "batch_size": order.batch_size,
            "inputs": hashlib.blake2b(listed, digest_size=8).hexdigest(),
            "dtype": self.dtype,
            "device": model.backbone.device.type,
            "compile": self.compile,
        }
        versions = {"ditloom": ditloom.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
        asked = list(order.inputs[:LISTED])
        return {"pictures": pictures, "inputs": asked, "made_with": versions, "report": None}

    def _finish(self, folder: RunFolder, order: Order, record: Mapping[str, Any], work: _Work, mine: Share) -> None:
        """The report, by the leader; the grid, by whichever process sees its pictures complete."""
        from ditloom.cli.grid import write_grid

        if mine.leads and work.drawn:
            folder.write({**record, "report": {"pictures": work.drawn, **work.report.to_dict()}})
        shown = range(min(order.total, ON_GRID))
        if self.grid != 0 and folder.has(shown) and (work.drawn or not folder.grid.exists()):
            write_grid(folder, [_title(order.input(number)) for number in shown], self.grid, record["pictures"])
            if not mine.leads:
                say(shown_path(folder.grid))

    def _answer(self, folder: RunFolder, order: Order, record: Mapping[str, Any], work: _Work, mine: Share) -> Answer:
        grid = folder.grid if folder.grid.exists() else None
        document = {
            "folder": folder.path,
            "grid": grid,
            "images": [folder.picture(number) for number in range(min(order.total, LISTED))],
            "total": order.total,
            "drawn": work.drawn,
            "found": work.found,
            "seconds": round(work.seconds, 3),
            "settings": record["pictures"],
            "report": work.report.to_dict(),
        }
        told = [f"{work}: {shown_path(folder.images)}", *work.report.notes, *([shown_path(grid)] if grid else [])]
        return Answer(document, told, quiet=not mine.leads)


@dataclass(frozen=True)
class _Work:
    """What this process drew now, what it found there, and what drawing took."""

    drawn: int
    found: int
    seconds: float
    report: Report

    def __str__(self) -> str:
        if not self.drawn:
            return f"nothing to draw, {self.found:,} pictures are there"
        before = f", {self.found:,} were there" if self.found else ""
        return f"{self.drawn:,} pictures in {self.seconds:.1f} s ({self.drawn / self.seconds:.3g} img/s){before}"


@dataclass(frozen=True)
class _Notes:
    """The text in each PNG: everything needed to draw this picture again."""

    pictures: Mapping[str, Any]

    def __call__(self, group: Group, place: int) -> dict[str, str]:
        import ditloom

        own = {"input": group.inputs[place], "seed": group.seed, "index": group.indices[place]}
        shared = {name: value for name, value in self.pictures.items() if name not in ("inputs", "seeds", "count")}
        title = _title(group.inputs[place])
        told = {"Software": f"ditloom {ditloom.__version__}", "ditloom": json.dumps({**own, **shared}, default=str)}
        return {"Description": title, **told} if title else told


def _title(value: str | int | None) -> str:
    return "" if value is None else str(value)


@contextlib.contextmanager
def _told_on_stop(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        say(f"the pictures drawn so far are in {shown_path(folder.images)}; the same command with --out goes on there")
        raise
