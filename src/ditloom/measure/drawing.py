"""Drawing the pictures of an evaluation, into a folder from which an interrupted one goes on.

Image i follows from (seed, i). The folder holds `drawing.json`, which says what is drawn and how, and one PNG an
image; a folder of another drawing is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ditloom.contracts.errors import UserError
from ditloom.measure.evidence import Pictures
from ditloom.training.durable import explained, json_bytes, replace_file

if TYPE_CHECKING:
    from ditloom.model import Model

RECORD = "drawing.json"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw; None is the model's own default. `batch_size` changes the speed only."""

    steps: int | None = None
    guidance: float | str | None = None
    sampler: str | None = None
    seed: int = 0
    using: tuple[str, ...] = ()
    batch_size: int = 32

    def resolved(self, model: Model) -> dict[str, Any]:
        """The settings that decide the pictures, with the model's defaults filled in."""
        given = {name: value for name, value in asdict(self).items() if name not in ("batch_size", "using")}
        return {**model.settings(**given), "using": list(self.using)}


def draw(
    model: Model,
    inputs: Sequence[str | int],
    sampling: Sampling | None = None,
    folder: Path | None = None,
    on_drawn: Callable[[int, int], None] | None = None,
) -> Pictures:
    """Pictures uint8 [N, H, W, C], image i from (seed, i); `on_drawn(done, total)` follows along.

    With a folder, batches of which every picture is there are not drawn again.
    """
    sampling = sampling or Sampling()
    if not inputs:
        raise UserError("there is nothing to draw: the list of inputs is empty")
    if folder is not None:
        _claim(folder, _record(model, inputs, sampling))
    drawn: list[Pictures] = []
    for start in range(0, len(inputs), sampling.batch_size):
        indices = range(start, min(start + sampling.batch_size, len(inputs)))
        kept = _kept(folder, indices)
        if kept is None:
            kept = _drawn(model, [inputs[i] for i in indices], indices, sampling)
            _keep(folder, indices, kept)
        drawn += kept
        if on_drawn is not None:
            on_drawn(indices.stop, len(inputs))
    return np.stack(drawn)


def model_hash(model: Model) -> str:
    """Sixteen hex digits of the configuration and every weight, wherever the model came from."""
    config = {name: value for name, value in model.config().items() if name not in ("info", "sampling")}
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=8)
    for part in (model.backbone, model.latents, model.conditioner):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()


def as_array(picture: Image.Image) -> Pictures:
    """uint8 [H, W, C]."""
    values = np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
    return values[:, :, None] if values.ndim == 2 else values


def as_picture(image: Pictures) -> Image.Image:
    """A pillow picture of uint8 [H, W, 1 or 3]."""
    return Image.fromarray(image[:, :, 0] if image.shape[-1] == 1 else image)


def _drawn(model: Model, inputs: list[str | int], indices: range, sampling: Sampling) -> list[Pictures]:
    result = model.generate(
        inputs,
        steps=sampling.steps,
        guidance=sampling.guidance,
        sampler=sampling.sampler,
        seed=sampling.seed,
        using=sampling.using,
        indices=indices,
        batch_size=sampling.batch_size,
    )
    return [as_array(picture) for picture in result.images]


def _record(model: Model, inputs: Sequence[str | int], sampling: Sampling) -> dict[str, Any]:
    asked = hashlib.blake2b(json.dumps(list(inputs)).encode(), digest_size=8).hexdigest()
    return {"model": model_hash(model), "inputs": asked, "count": len(inputs), **sampling.resolved(model)}


def _claim(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record into a fresh folder, or see that it is the one there."""
    path = folder / RECORD
    wanted = json.loads(json.dumps(record, default=str))
    with explained("write to", folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            replace_file(path, [json_bytes(wanted)])
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = {}
    unlike = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if unlike:
        raise UserError(f"{folder} holds pictures drawn with another {', '.join(unlike)}: name a new folder")


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def _kept(folder: Path | None, indices: range) -> list[Pictures] | None:
    """The pictures of a batch if the folder has all of them whole."""
    if folder is None:
        return None
    try:
        return [as_array(Image.open(_file(folder, index))) for index in indices]
    except (OSError, SyntaxError):
        return None


def _keep(folder: Path | None, indices: range, pictures: Sequence[Pictures]) -> None:
    if folder is None:
        return
    for index, picture in zip(indices, pictures, strict=True):
        packed = io.BytesIO()
        as_picture(picture).save(packed, "PNG")
        with explained("write to", folder):
            replace_file(_file(folder, index), [packed.getvalue()])
