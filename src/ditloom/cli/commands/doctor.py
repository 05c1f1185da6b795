"""Tell what is installed, which backends run, and how fast this machine is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ditloom.cli.command import Answer, Command, OptionalNumber
from ditloom.cli.place import device_of
from ditloom.cli.show import count, table
from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register

DEFAULT_SECONDS = 1.0
NOTICEABLE = 1.2


@register("doctor")
@dataclass(frozen=True, kw_only=True)
class Doctor(Command):
    """Look at this installation: versions, extras, devices, number formats, attention backends, and speeds.

    Speeds are those of a matrix product and of a DiT-S/2 forward with 4 images; its share is of the matrix product.
    """

    device: str = "auto"
    """what to time: auto, cpu, cuda or mps"""
    seconds: OptionalNumber = DEFAULT_SECONDS
    """seconds for each timing (default: 1); 0 times nothing"""

    def run(self) -> Answer:
        if self.seconds is None or not 0 <= self.seconds <= 600:
            raise UserError(f"--seconds lies between 0 and 600; got {self.seconds}")
        import ditloom
        from ditloom.cli import machine

        device = device_of(self.device)
        document = {
            "ditloom": ditloom.__version__,
            "versions": machine.versions(),
            "extras": machine.extras(),
            "processor": machine.processor(),
            "accelerators": machine.accelerators(),
            "device": device,
            "attention": {name: machine.attention_backend(device, d) for name, d in machine.NUMBER_FORMATS.items()},
            "speed": speeds(device, self.seconds) if self.seconds else {},
        }
        document["advice"] = list(advice(document))
        return Answer(document, list(shown(document)))


def speeds(device: str, seconds: float) -> dict[str, dict[str, Any]]:
    """By number format: the matrix product's operations a second, the model's speed and its share of that."""
    from ditloom.cli import machine

    found = {}
    for name, dtype in machine.NUMBER_FORMATS.items():
        product = machine.matmul_speed(device, dtype, seconds / 2)
        model = machine.model_speed(device, dtype, seconds)
        found[name] = {"matmul_flops": product, **model, "share": model["flops"] / product}
    return found


def advice(found: dict[str, Any]) -> Iterator[str]:
    """What would make this installation better."""
    speed = found["speed"]
    if speed:
        gain = speed["bf16"]["images_per_second"] / speed["fp32"]["images_per_second"]
        if gain > NOTICEABLE:
            yield f"--dtype bf16 is {gain:.1f} times as fast as fp32 here"
        elif gain < 1 / NOTICEABLE:
            yield f"bf16 is {1 / gain:.1f} times slower than fp32 here: stay with fp32"
    if found["extras"].get("text") and None in found["extras"]["text"].values():
        yield "text models need pip install 'ditloom[text]'"
    cores, threads = found["processor"]["cores"], found["processor"]["threads"]
    if found["device"] == "cpu" and cores and threads < cores:
        yield f"{threads} of {cores} cores are used: OMP_NUM_THREADS={cores} would use all"


def shown(found: dict[str, Any]) -> Iterator[Any]:
    """What a person reads."""
    chip = found["processor"]
    memory = f", {chip['memory'] / 1e9:.1f} GB of memory" if chip["memory"] else ""
    yield f"ditloom {found['ditloom']}, " + ", ".join(f"{name} {value}" for name, value in found["versions"].items())
    units = " ".join(name for name, present in chip["units"].items() if present)
    yield f"processor: {chip['name']}, {chip['cores']} cores{memory}, {units}"
    for one in found["accelerators"] or [{"device": "none"}]:
        yield f"accelerator: {', '.join(f'{k} {v}' for k, v in one.items())}"
    yield ""
    rows = [(extra, _packages(needed)) for extra, needed in found["extras"].items()]
    yield table(("extra", "installed"), rows)
    yield ""
    rows = [(name, kernel, *_speed(found["speed"].get(name))) for name, kernel in found["attention"].items()]
    columns = (found["device"], "attention", "matmul FLOP/s", "DiT-S/2 img/s", "its share")
    yield table(columns, rows, right=columns[2:])
    yield from (f"advice: {sentence}" for sentence in found["advice"])


def _packages(needed: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" if version else f"{name} missing" for name, version in needed.items())


def _speed(speed: dict[str, Any] | None) -> tuple[str, str, str]:
    if speed is None:
        return "", "", ""
    return count(speed["matmul_flops"]), f"{speed['images_per_second']:.3g}", f"{speed['share']:.0%}"
