"""What the extension mechanism costs: nothing attached against a hand-written loop, attached and idle against nothing.

python -m benchmarks overhead
"""

from __future__ import annotations

import json

import torch

import ditloom
from benchmarks.dit_speed import randomise
from benchmarks.timing import interleaved, ratios
from ditloom.backbones.dit import DiTConfig
from ditloom.contracts.backbone import Backbone
from ditloom.contracts.clock import Schedule
from ditloom.contracts.method import Handler
from ditloom.sites.run import Run

RUNS = 40


class Idle(Handler):
    """Attached, and never acting."""

    key = "idle"


def measure(net: Backbone, batch: int, repeats: int) -> dict[str, float]:
    """Ratios of one forward, and the microseconds a block costs more."""
    randomise(net.eval())
    x, t, condition = net.example(batch)
    t = t[:1].expand(batch)
    schedule = Schedule((float(t[0]), 0.0), (float(net.preset.time.native(t[:1])[0]), 0.0), ("cond",))
    memory = net.prepare(condition)
    runs = [Run(net, handlers, schedule=schedule, conditions={"cond": condition}) for handlers in ([], [Idle()])]

    def by_hand() -> None:
        streams, context = net.embed(x, net.preset.time.native(t), memory)
        for block in net.blocks:
            streams, _ = block(streams, context)
        net.head(streams, context)

    def repeated(run: object) -> None:
        for _ in range(repeats):
            run()  # type: ignore[operator]

    with torch.no_grad():
        times = interleaved(
            {
                "loop": lambda: repeated(by_hand),
                "nothing": lambda: repeated(lambda: runs[0].predict(x, schedule.clock(0))),
                "idle": lambda: repeated(lambda: runs[1].predict(x, schedule.clock(0))),
            },
            RUNS,
        )
    per_block = 1e6 / repeats / len(net.blocks)
    return {
        "nothing over loop": ratios(times["nothing"], times["loop"]),
        "idle over nothing": ratios(times["idle"], times["nothing"]),
        "idle us per block": (times["idle"].median - times["nothing"].median) * per_block,
        "block us": times["loop"].median * per_block,
    }


def main() -> None:
    """Print the ratios as JSON."""
    tiny = DiTConfig(depth=8, width=32, heads=2, image_size=8, classes=10).build()
    print(json.dumps({"DiT-S/2": measure(ditloom.build("DiT-S/2"), 2, 1), "tiny": measure(tiny, 1, 10)}, indent=2))
