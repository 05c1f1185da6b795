"""How much of the time that skipped MACs allow a cache really saves, on a model of DiT-XL/2's shape in bf16.

python -m benchmarks cache_speed
"""

from __future__ import annotations

import json

import torch

import ditloom
from benchmarks.dit_speed import randomise
from benchmarks.machine import clock
from benchmarks.timing import interleaved, ratios
from ditloom.contracts.backbone import Backbone
from ditloom.contracts.condition import Condition
from ditloom.contracts.registries import METHODS, PROCESSES
from ditloom.contracts.settings import registered
from ditloom.samplers.drawing import Drawing
from ditloom.samplers.euler import Euler
from ditloom.samplers.guidance.cfg import CFG
from ditloom.sites.report import Report
from ditloom.sites.surface import Surface

IMAGES, STEPS, RUNS = 2, 6, 1
METHODS_TIMED = (
    "fora:interval=2",
    "fora:interval=4",
    "delta-dit",
    "taylorseer:interval=4",
    "dbcache:threshold=1e9,warmup=1,max_consecutive=3",
    "guidance-gate",
)


def drawing(net: Backbone, method: str | None) -> Drawing:
    """A guided drawing of two images, with or without a method."""
    labels = {"cond": torch.tensor([1, 2]), "uncond": torch.tensor([1000, 1000])}
    conditions = {name: Condition(label=label) for name, label in labels.items()}
    process = registered(PROCESSES, {"name": "linear", "predicts": "v"})
    handlers = []
    if method is not None:
        surface = surface_of(net, conditions["cond"])
        handlers = [registered(METHODS, method).bind(surface)]
    return Drawing(net, process, Euler(), CFG(scale=4.0), conditions, handlers, indices=range(IMAGES))


def surface_of(net: Backbone, condition: Condition) -> Surface:
    """The sites of the network."""
    x, t, _ = net.example(IMAGES)
    with torch.no_grad():
        streams, _ = net.embed(x, net.preset.time.native(t), net.prepare(condition))
    return Surface(net, streams.layout, ("cond", "uncond"))


def run(net: Backbone, method: str | None) -> Report:
    """One whole drawing."""
    made = drawing(net, method)
    for _ in made.walk((4, 32, 32), STEPS):
        pass
    return made.report


def main() -> None:
    """Print for each method the speed-up, what its MACs allow, and the share of it that is reached."""
    net = ditloom.build("DiT-XL/2", learn_sigma=False).eval().to(torch.bfloat16).requires_grad_(False)
    randomise(net)
    names: list[str | None] = [None, *METHODS_TIMED]
    reports = {str(name): run(net, name) for name in names}
    times = interleaved({str(name): lambda name=name: run(net, name) for name in names}, RUNS, 0, clock())
    found = {}
    for name in METHODS_TIMED:
        allowed, reached = reports[name].full_macs / reports[name].macs, ratios(times["None"], times[name])
        found[name] = {"speed-up": reached, "MACs allow": allowed, "share": reached / allowed}
    shape = {"images": IMAGES, "branches": 2, "steps": STEPS, "threads": torch.get_num_threads(), "warm-up": 1}
    print(json.dumps({"plain seconds": times["None"].median, **shape, "methods": found}, indent=2))


if __name__ == "__main__":
    main()
