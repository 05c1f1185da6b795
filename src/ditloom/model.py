"""A model: backbone, process, latent space and conditioner, and its folder on disk. The door to every upper floor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ditloom.caches.presets import expanded
from ditloom.calibration import Circumstances, find
from ditloom.contracts.backbone import Backbone
from ditloom.contracts.condition import Condition
from ditloom.contracts.conditioner import Conditioner
from ditloom.contracts.errors import UserError
from ditloom.contracts.latent import LatentSpace
from ditloom.contracts.method import Assets, Handler, Learned, Method
from ditloom.contracts.process import Process
from ditloom.contracts.registries import GUIDANCE, METHODS, SAMPLERS
from ditloom.contracts.sampler import Step
from ditloom.contracts.settings import registered
from ditloom.samplers.drawing import Drawing
from ditloom.sites.report import Report
from ditloom.sites.surface import Surface

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULTS = {"sampler": "euler", "steps": 30, "guidance": "cfg:scale=3.0", "size": None}
Using = Sequence[str | Method | Handler]
Input = str | int | None


@dataclass
class Result:
    """What `generate` returns: images in the order of their inputs, latents, the report, and the settings used."""

    images: list[Image]
    latents: Tensor
    report: Report
    settings: dict[str, Any]


@dataclass
class Batch:
    """One batch on its way: its images' indices and inputs; iterate `steps` to draw it, then `decoded`."""

    indices: list[int]
    drawing: Drawing
    shape: tuple[int, ...]
    steps_total: int

    def steps(self) -> Iterator[Step]:
        """The steps of this batch."""
        return self.drawing.walk(self.shape, self.steps_total)


@dataclass
class Model:
    """A trained Diffusion Transformer with everything around it.

    sampling: defaults for `generate` (sampler, steps, guidance, size). info: provenance (name, licence, recipe, data).
    folder: where it was loaded from, and its calibrations are kept.
    """

    backbone: Backbone
    process: Process
    latents: LatentSpace
    conditioner: Conditioner
    sampling: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    attached: list[str | Method | Handler] = field(default_factory=list)
    folder: Path | None = None

    def generate(
        self,
        inputs: Sequence[Input] | Input,
        *,
        steps: int | None = None,
        seed: int = 0,
        guidance: Any = None,
        sampler: Any = None,
        negative: Input = None,
        using: Using = (),
        indices: Sequence[int] | None = None,
        size: int | tuple[int, int] | None = None,
        batch_size: int = 32,
        batched: bool = True,
        on_step: Callable[[Batch, Step], None] | None = None,
    ) -> Result:
        """Draw one image per input (a prompt, a class, or None).

        Image i is drawn from (seed, indices[i]) alone, whatever the batch. guidance: a scale, or a rule such as
        "cfg:scale=3"; negative: what guidance leads away from. using: methods, as "name:key=value" or objects.
        """
        listed = [inputs] if isinstance(inputs, str | int) or inputs is None else list(inputs)
        settings = self.settings(steps=steps, seed=seed, guidance=guidance, sampler=sampler, size=size)
        numbers = list(range(len(listed))) if indices is None else list(indices)
        if len(numbers) != len(listed):
            raise UserError(f"{len(numbers)} image indices are given for {len(listed)} inputs")
        report, latents = Report(), []
        for start in range(0, len(listed), batch_size):
            part = slice(start, start + batch_size)
            batch = self.batch(listed[part], numbers[part], settings, negative, using, batched)
            batch.drawing.report = report
            for step in batch.steps():
                if on_step is not None:
                    on_step(batch, step)
            latents.append(step.x)
        x = torch.cat(latents) if latents else torch.empty(0)
        return Result(self.pictures(x) if latents else [], x, report, self.changed(settings, using))

    def settings(self, **given: Any) -> dict[str, Any]:
        """The sampling settings: what is given, else the model's own defaults; checked."""
        chosen = {**DEFAULTS, **self.sampling, **{k: v for k, v in given.items() if v is not None}}
        if not 1 <= int(chosen["steps"]) <= 10_000:
            raise UserError(f"steps must be between 1 and 10000; got {chosen['steps']}")
        if isinstance(chosen["guidance"], int | float):
            scale = float(chosen["guidance"])
            if not -100.0 <= scale <= 100.0:
                raise UserError(f"the guidance scale must lie in -100..100; got {scale}")
            chosen["guidance"] = f"cfg:scale={scale}"
        return chosen

    def changed(self, settings: Mapping[str, Any], using: Using = ()) -> dict[str, Any]:
        """The sampling settings after the methods that change some, each setting at most once."""
        chosen = dict(settings)
        by: dict[str, str] = {}
        for method in self._methods(using):
            if isinstance(method, Method):
                for name, value in method.sampling(settings).items():
                    key = type(method).__registration__.name  # type: ignore[attr-defined]
                    if name in by:
                        raise UserError(f"{by[name]} and {key} cannot run together: both change {name}")
                    chosen[name], by[name] = value, key
        return chosen

    def _methods(self, using: Using) -> list[Method | Handler]:
        """What is attached and what is asked for, as objects."""
        asked = expanded((*self.attached, *using))
        return [m if isinstance(m, Handler) else registered(METHODS, m) for m in asked]

    def batch(
        self,
        inputs: Sequence[Input],
        indices: Sequence[int],
        settings: Mapping[str, Any],
        negative: Input = None,
        using: Using = (),
        batched: bool = True,
    ) -> Batch:
        """Prepare a batch: conditions of all branches, sampler, guidance and handlers."""
        settings = self.changed(settings, using)
        guidance = registered(GUIDANCE, settings["guidance"])
        sampler = registered(SAMPLERS, settings["sampler"])
        shape = self.latent_shape(settings.get("size"))
        conditions = self.conditions(inputs, negative, guidance.needs)
        drawing = Drawing(
            self.backbone,
            self.process,
            sampler,
            guidance,
            conditions,
            self.handlers(using, shape, settings),
            seed=int(settings.get("seed", 0)),
            indices=list(indices),
            batched=batched,
        )
        return Batch(list(indices), drawing, shape, int(settings["steps"]))

    def latent_shape(self, size: int | tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image size (the native one by default)."""
        native = getattr(self.backbone.preset, "image_size", 32) * self.latents.factor
        return self.latents.shape(size or self.sampling.get("size") or native)

    def handlers(
        self, using: Using, shape: tuple[int, ...], settings: Mapping[str, Any] | None = None
    ) -> list[Handler]:
        """What is attached and what is asked for, bound to this model, but for what acts nowhere.

        settings: those of the run, by which calibrations are found; the model's own by default.
        """
        wanted = self._methods(using)
        if not wanted:
            return []
        surface = self.surface(shape)
        bound = [m if isinstance(m, Handler) else m.bind(surface, self._assets(m, shape, settings)) for m in wanted]
        return [handler for handler in bound if type(handler) is not Handler]

    def _assets(self, method: Method, shape: tuple[int, ...], settings: Mapping[str, Any] | None) -> Assets | None:
        return find(method, Circumstances.of(self, shape, settings)) if isinstance(method, Learned) else None

    def surface(self, shape: tuple[int, ...] | None = None) -> Surface:
        """The sites of this model at a latent size."""
        x = torch.zeros(1, *(shape or self.latent_shape()), device=self.backbone.device)
        time = torch.zeros(1, dtype=torch.float64, device=x.device)
        with torch.no_grad():
            memory = self.backbone.prepare(self.conditioner.null(1).to(x.device))
            streams, _ = self.backbone.embed(x, time, memory)
        return Surface(self.backbone, streams.layout, ("cond", "uncond"))

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> list[Image]:
        """Decode latents [B, C, h, w] to pictures."""
        from PIL import Image

        decoded = [self.latents.decode(part.float()) for part in latents.split(32)]
        pixels = (torch.cat(decoded).clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).cpu()
        arrays = [p.permute(1, 2, 0).numpy() for p in pixels]
        return [Image.fromarray(a.squeeze(-1) if a.shape[-1] == 1 else a) for a in arrays]

    def conditions(self, inputs: Sequence[Input], negative: Input, branches: Sequence[str]) -> dict[str, Condition]:
        """One condition per branch: what is asked for, and what guidance leads away from."""
        device, dtype = self.backbone.device, self.backbone.dtype
        cond = self.conditioner.encode(list(inputs)).to(device, dtype)
        made = {"cond": cond}
        for name in branches:
            if name == "weak":
                made[name] = cond
            elif name not in made:
                made[name] = self.conditioner.encode([negative] * len(inputs)).to(device, dtype)
        return made

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Model:
        """Move; `dtype` applies to the backbone, the latent space stays in float32."""
        self.backbone.to(device=device, dtype=dtype)
        self.latents.to(device=device)
        self.conditioner.to(device=device)
        return self

    def compile(self, *, frozen: bool = False) -> Model:
        """Compile the backbone block by block; frozen: for drawing alone, with the weights as constants (CPU)."""
        from ditloom.sites.compiling import compile_blocks

        compile_blocks(self.backbone, frozen=frozen and self.backbone.device.type == "cpu")
        return self

    def config(self) -> dict[str, Any]:
        """What config.json holds."""
        return {
            "format": 1,
            "backbone": self.backbone.preset.to_dict(),
            "process": self.process.config(),
            "latents": _component(self.latents),
            "conditioner": _component(self.conditioner),
            "sampling": self.sampling,
            "info": self.info,
        }

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write the model folder: config.json and model.safetensors, each beside and then renamed."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {k: _stored(v, dtype) for k, v in self._state().items()}
            beside = folder / "model.safetensors.part"
            save_file(tensors, beside)
            beside.chmod(0o644)
            beside.replace(folder / "model.safetensors")
            beside = folder / "config.json.part"
            beside.write_text(json.dumps(self.config(), indent=2) + "\n", encoding="utf-8")
            beside.replace(folder / "config.json")
        except OSError as error:
            raise UserError(f"cannot write the model to {folder}: {error.strerror or error}") from error
        return folder

    def parts(self) -> dict[str, nn.Module]:
        parts = {"backbone": self.backbone, "latents": self.latents, "conditioner": self.conditioner}
        return {k: v for k, v in parts.items() if not getattr(v, "ships_apart", False)}

    def _state(self) -> dict[str, Tensor]:
        return {f"{name}.{k}": v for name, part in self.parts().items() for k, v in part.state_dict().items()}


def _component(part: Any) -> dict[str, Any]:
    return {"name": type(part).__registration__.name, **part.config()}


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


@contextmanager
def using(target: Any, *methods: str | Method | Handler) -> Iterator[Any]:
    """Attach methods to a model for the length of a `with` block; what it cannot have is refused at once."""
    if not isinstance(target, Model):
        raise UserError(f"methods attach to a ditloom model; got a {type(target).__name__}")
    at_once = [m for m in target._methods(methods) if not isinstance(m, Learned)]  # a run tells which calibration fits
    target.handlers(at_once, target.latent_shape())
    before = list(target.attached)
    target.attached.extend(methods)
    try:
        yield target
    finally:
        target.attached[:] = before
