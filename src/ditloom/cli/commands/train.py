"""Train a model from a YAML recipe, or go on where the run stopped."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional, UseAppendAction

from ditloom.cli.command import Answer, Command, OptionalPath, OptionalText
from ditloom.cli.overrides import overridden
from ditloom.cli.show import shown_path
from ditloom.contracts.registry import register

if TYPE_CHECKING:
    from ditloom.training.launch import World
    from ditloom.training.recipe import Recipe
    from ditloom.training.trainer import Outcome


@register("train")
@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train from a recipe into a run folder: checkpoints, metrics, samples, report.html, and the model at the end.

    The same command goes on from the newest whole checkpoint. SIGTERM and Ctrl-C save first. On several processes:
    torchrun --nproc-per-node 2 --no-python ditloom train RECIPE.yaml --out RUN
    """

    recipe: Positional[Path]
    """a YAML file with the parts model, data and train"""
    set: UseAppendAction[tuple[str, ...]] = ()
    """a setting in place of the recipe's, such as train.batch=64"""
    out: OptionalPath = None
    """the run folder; unless given, runs/ and the recipe's name"""
    device: OptionalText = None
    """cpu or cuda; unless given, cuda where there is one"""

    def run(self) -> Answer:
        from ditloom.training.launch import launched

        recipe = recipe_of(self.recipe, self.set)
        with launched(self.device) as world:
            outcome = self._train(recipe, world)
            return self._finished(recipe, outcome) if world.leader else Answer({}, quiet=True)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return (self.out or Path("runs") / self.recipe.stem).expanduser()

    def _train(self, recipe: Recipe, world: World) -> Outcome:
        trainer, _ = recipe.trainer(self.folder, world)
        if world.leader:
            recipe.save(self.folder)
        return trainer.train()

    def _finished(self, recipe: Recipe, outcome: Outcome) -> Answer:
        from ditloom.training.progress import duration
        from ditloom.training.report import write_report

        report = write_report(self.folder, self.recipe.stem)
        model = None if outcome.checkpoint is None else self._exported(recipe)
        document: dict[str, Any] = {**asdict(outcome), "run": self.folder, "model": model, "report": report}
        told = f"{outcome.images:,} images in {duration(outcome.seconds)}: {shown_path(report)}"
        end = [f"ditloom generate --model {shown_path(model)}"] if model else []
        if outcome.stopped:
            end = ["stopped before the end; the same command goes on"]
        return Answer(document, [told, *end])

    def _exported(self, recipe: Recipe) -> Path:
        """The model folder of the newest checkpoint, which knows what it learned from."""
        from ditloom.training.export import exported

        model = exported(self.folder)
        model.info.setdefault("name", self.recipe.stem)
        model.info.setdefault("source", recipe.to_dict()["data"]["source"])
        return model.save(self.folder / "model")


def recipe_of(path: Path, changes: tuple[str, ...]) -> Recipe:
    """The recipe of a file with single settings changed."""
    from ditloom.training.config import read_yaml
    from ditloom.training.recipe import Recipe

    return Recipe.from_dict(overridden(read_yaml(path), changes))
