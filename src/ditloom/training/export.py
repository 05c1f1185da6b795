"""From a training run to a model folder: the newest whole checkpoint's averaged weights in the model that learned."""

from __future__ import annotations

from pathlib import Path

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.loading import assemble, check_state
from ditloom.model import Model
from ditloom.training import checkpoint


def exported(run: str | Path, average: str | None = None) -> Model:
    """The model of a run, ready to draw or save.

    average: the name of an average, or "none" for the raw weights; by default the first average there is. The
    model's info records the images seen and which weights were taken.
    """
    found = checkpoint.latest(Path(run))
    if found.path is None:
        raise UserError(f"{run} holds no whole checkpoint to export{': ' + found.broken[0] if found.broken else ''}")
    saved = checkpoint.read(found.path)
    chosen = _chosen(saved, average)
    model = assemble(saved.state["model"])
    weights = {**saved.tensors["model"], **(saved.tensors[f"average-{chosen}"] if chosen else {})}
    check_state(model.backbone.state_dict(), weights, f"{found.path.name}: backbone")
    model.backbone.load_state_dict(weights)
    model.backbone.eval().requires_grad_(False)
    model.info |= {"images": saved.images, "weights": f"average {chosen}" if chosen else "raw"}
    return model


def _chosen(saved: checkpoint.Checkpoint, average: str | None) -> str | None:
    names = [group.removeprefix("average-") for group in saved.tensors if group.startswith("average-")]
    if average == "none" or (average is None and not names):
        return None
    if average is not None and average not in names:
        raise UnknownName("average", average, [*names, "none"])
    return average or names[0]
