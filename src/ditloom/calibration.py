"""Calibrations: what they were made for, where they are kept, and which of them fits a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ditloom.contracts.assets import packed, read
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets, Learned
from ditloom.contracts.registries import GUIDANCE, SAMPLERS, TRAININGS
from ditloom.contracts.settings import registered
from ditloom.data.fetch import cache_folder

if TYPE_CHECKING:
    from ditloom.model import Model

PACKAGE = Path(__file__).parent
SAMPLED = 64
"""Values of every tensor that a fingerprint looks at."""


@dataclass(frozen=True)
class Circumstances:
    """What a calibration depends on besides its method; equal circumstances, equal statistics up to the pictures.

    name: how a user writes the model. folder: where it lies. size: the latent's, such as 16x8x8.
    """

    name: str
    folder: Path | None
    model: str
    process: str
    sampler: str
    steps: int
    guidance: str
    size: str

    @classmethod
    def of(cls, model: Model, shape: Sequence[int], settings: Mapping[str, Any] | None = None) -> Circumstances:
        """Those of a model at a latent size, under sampling settings (its own by default)."""
        chosen = model.settings() if settings is None else settings
        return cls(
            name=written(model),
            folder=None if model.folder is None else Path(model.folder),
            model=fingerprint(model.backbone),
            process=json.dumps(model.process.config(), sort_keys=True, default=str),
            sampler=spelled(registered(SAMPLERS, chosen["sampler"])),
            steps=int(chosen["steps"]),
            guidance=spelled(registered(GUIDANCE, chosen["guidance"])),
            size="x".join(str(side) for side in shape),
        )

    def facts(self, key: str) -> dict[str, Any]:
        """What a calibration of a method made now says, and what one that is used now must say."""
        own = ("model", "process", "sampler", "steps", "guidance", "size")
        return {"method": key, **{name: getattr(self, name) for name in own}}

    def command(self, key: str) -> str:
        """How to make a calibration for just these."""
        how = f"--steps {self.steps} --sampler {self.sampler} --guidance {self.guidance}"
        asked = "--train" if key in TRAININGS.names() else "--methods"
        return f"ditloom calibrate --model {self.name} {asked} {key} {how}"

    @property
    def places(self) -> list[Path]:
        """Where calibrations are looked for: with the model, and in the user's cache."""
        shared = cache_folder() / "calibration" / self.model
        return [shared] if self.folder is None else [self.folder / "calibration", shared]


def written(model: Model) -> str:
    """How a user writes a model: its folder, or the name of one that is bundled."""
    folder = None if model.folder is None else Path(model.folder)
    own = folder is not None and not folder.is_relative_to(PACKAGE)
    return str(folder) if own else str(model.info.get("name", "MODEL"))


def fingerprint(network: nn.Module) -> str:
    """Sixteen hex digits of every tensor's name, shape and some of its values, alike in float32 and bfloat16."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(network.state_dict().items()):
        flat = tensor.detach().flatten()
        some = flat[:: max(len(flat) // SAMPLED, 1)].cpu().to(torch.bfloat16).float()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def spelled(part: Any) -> str:
    """A sampler or guidance rule as a user writes it: its name, and what differs from the defaults."""
    defaults = {field.name: field.default for field in fields(part)}
    given = {k: v for k, v in part.config().items() if k != "name" and v != defaults.get(k)}
    listed = ",".join(f"{k}={v}" for k, v in given.items())
    return f"{type(part).__registration__.name}:{listed}" if listed else str(type(part).__registration__.name)


def find(method: Learned, now: Circumstances) -> Assets | None:
    """The calibration of a method for these circumstances: the file it names, or the first fitting one that is kept.

    None where the method can do without; else one sentence on what is missing and how to make it.
    """
    key = type(method).__registration__.name  # type: ignore[attr-defined]
    facts = {name: value for name, value in now.facts(key).items() if name not in method.tolerates}
    if method.calibration:
        named = read(method.calibration)
        named.check(key, **facts)
        return named
    paths = [path for place in now.places for path in sorted(place.glob(f"{key}-*.safetensors"))]
    kept = sorted((read(path) for path in paths), key=lambda assets: len(assets.unlike(**facts)))
    if kept and not kept[0].unlike(**facts):
        return kept[0]
    if not method.needs_calibration:
        return None
    there = f" (there is one for {'; '.join(kept[0].unlike(**facts))})" if kept else ""
    raise UserError(f"{key} needs a calibration of this model for this run{there}: make it with  {now.command(key)}")


def keep(assets: Assets, key: str, now: Circumstances) -> Path:
    """Write a calibration with its model, or into the user's cache where that is bundled or may not be written."""
    facts = json.dumps(now.facts(key), sort_keys=True).encode()
    mark = hashlib.blake2b(facts, digest_size=3).hexdigest()
    name = f"{key}-{now.sampler.partition(':')[0]}-{now.steps}-{mark}.safetensors"
    failed: OSError | None = None
    for place in (place for place in now.places if not place.is_relative_to(PACKAGE)):
        try:
            place.mkdir(parents=True, exist_ok=True)
            beside = place / f".{name}.part"
            beside.write_bytes(packed(assets))
            return beside.replace(place / name)
        except OSError as error:
            failed = error
    raise UserError(f"the calibration cannot be written: {failed}")
