"""Every backbone family: inference and a training step, beside diffusers' module where it has the architecture.

python -m benchmarks families [family ...] [--markdown]

Ours runs in bf16, eager and with frozen compiled blocks; diffusers' module of the same configuration as its users run
it on a CPU, under bf16 autocast, and with its weights cast to bf16. All contenders of a family take turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.dit_speed import no_grad, randomise, train_step_of
from benchmarks.family_configs import CONFIGS
from benchmarks.peers import Arguments, Peer, in_bf16, peer_of
from benchmarks.timing import Timing, interleaved, ratios
from ditloom.contracts.backbone import Backbone, BackboneConfig
from ditloom.contracts.registries import BACKBONES, PROCESSES
from ditloom.contracts.settings import registered
from ditloom.sites.compiling import compile_blocks
from ditloom.training.learner import STUDENT, Learner
from ditloom.training.objectives.denoise import Denoise
from ditloom.training.optim import AdamW
from ditloom.training.schedules import Constant
from ditloom.training.step import Phase

BATCH, RUNS, RATE = 4, 8, 1e-4
COLUMNS = {
    "forward img/s": "forward eager",
    "frozen img/s": "forward frozen",
    "training img/s": "training ours",
    "diffusers forward": "forward diffusers",
    "ratio eager": "forward eager / diffusers",
    "ratio compiled+frozen": "forward frozen / diffusers",
    "ratio eager, both cast": "forward eager / cast",
    "ratio training": "training ours / diffusers",
}

OURS, THEIRS = ("eager", "frozen", "ours"), ("diffusers", "cast")

Contenders = dict[str, Callable[[], object]]
Row = dict[str, float]


def forward_contenders(config: BackboneConfig, peer: Peer | None) -> Contenders:
    """What takes turns in inference."""
    full = filled(config).eval()
    net = copy.deepcopy(full).to(torch.bfloat16)
    x, t, condition = net.example(BATCH)
    given = (x.bfloat16(), t, condition.to(dtype=torch.bfloat16))
    frozen = copy.deepcopy(net)
    compile_blocks(frozen, frozen=True)
    contenders: Contenders = {"eager": partial(no_grad, net, *given), "frozen": partial(no_grad, frozen, *given)}
    if peer is None:
        return contenders
    theirs, arguments = peer.build(full).eval(), peer.arguments(config, x, t, condition)
    cast = copy.deepcopy(theirs).to(torch.bfloat16)
    return {
        "diffusers": partial(predicted, theirs, arguments, autocast=True),
        "cast": partial(predicted, cast, in_bf16(arguments)),
        **contenders,
    }


def training_contenders(config: BackboneConfig, peer: Peer | None) -> Contenders:
    """What takes turns in training: forward, backward and optimiser."""
    net = filled(config)
    theirs = peer.build(net) if peer is not None else None
    x, t, condition = net.example(BATCH)
    noise = torch.randn_like(x)
    process = registered(PROCESSES, {"name": "linear", "predicts": "v"})
    phase = Phase(objectives={"denoise": Denoise(process)}, optimiser=AdamW(lr=RATE), schedule=Constant())
    step = train_step_of(Learner({STUDENT: net}, process, [phase], precision="bf16", compile=True))
    contenders: Contenders = {"ours": partial(step, x, noise, t, condition)}
    if peer is not None and theirs is not None:
        contenders = {"diffusers": their_step(theirs, peer.arguments(config, x, t, condition)), **contenders}
    return contenders


def their_step(theirs: nn.Module, arguments: Arguments) -> Callable[[], None]:
    """A training step of diffusers' module as scripts write it, towards a target of its output's shape."""
    optimiser = torch.optim.AdamW(theirs.parameters(), lr=RATE)
    target = torch.randn_like(predicted(theirs, arguments, autocast=True), dtype=torch.float32)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = (theirs(**arguments, return_dict=False)[0] - target).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


@torch.no_grad()
def predicted(model: nn.Module, arguments: Arguments, autocast: bool = False) -> Tensor:
    """diffusers' prediction."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(**arguments, return_dict=False)[0]


def filled(config: BackboneConfig) -> Backbone:
    """A fresh network without tensors of zeros."""
    net = config.build()
    randomise(net)
    return net


def family(name: str) -> Row:
    """Images per second of every contender, and how often faster ours are."""
    torch.manual_seed(0)
    torch.compiler.reset()
    config, peer, row = CONFIGS[name], peer_of(name), Row()
    for what, contenders in (("forward", forward_contenders), ("training", training_contenders)):
        times = interleaved(contenders(config, peer), RUNS)
        row |= {f"{what} {who}": BATCH / timing.median for who, timing in times.items()}
        row |= {f"{what} {pair}": ratio for pair, ratio in compared(times).items()}
    return row


def compared(times: Mapping[str, Timing]) -> Row:
    """Their time over ours, for every pair of one of theirs and one of ours."""
    pairs = [(mine, who) for mine in OURS for who in THEIRS if mine in times and who in times]
    return {f"{mine} / {who}": ratios(times[who], times[mine]) for mine, who in pairs}


def markdown(rows: Mapping[str, Row]) -> str:
    """The table of all families, a dash where there is nothing to compare with."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    for name, row in rows.items():
        cells = (f"{row[key]:.2f}" if key in row else "-" for key in COLUMNS.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


def wanted(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """(families, as a table?)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks families", description=__doc__)
    parser.add_argument("family", nargs="*", help="default: every registered family")
    parser.add_argument("--markdown", action="store_true", help="a table instead of JSON")
    asked = parser.parse_args(arguments)
    names = asked.family or BACKBONES.names()
    for name in names:
        if name not in CONFIGS:
            parser.error(f"no family {name!r} to time: there are {', '.join(CONFIGS)}")
    return names, asked.markdown


def main(arguments: Sequence[str] = ()) -> int:
    """Time the families one after the other; 1 if one of them failed."""
    names, as_table = wanted(arguments)
    rows: dict[str, Row] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            rows[name] = family(name)
            say(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in rows[name].items()))
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            say(f"{name} failed\n{traceback.format_exc()}")
    document = {"threads": torch.get_num_threads(), "batch": BATCH, "families": rows, "failed": failed}
    print(markdown(rows) if as_table else json.dumps(document, indent=2))
    return int(bool(failed))
