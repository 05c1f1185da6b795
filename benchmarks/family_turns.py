"""One family in turns: inference and a training step, diffusers' module of the same weights, bare matrix products."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.dit_speed import no_grad, randomise, train_step_of
from benchmarks.machine import PRODUCT_MACS, clock, products
from benchmarks.peers import Arguments, Peer, in_bf16
from benchmarks.timing import Timing, interleaved, ratios
from ditloom.contracts.backbone import Backbone, BackboneConfig, on_paper
from ditloom.contracts.registries import PROCESSES
from ditloom.contracts.settings import registered
from ditloom.sites.compiling import compile_blocks
from ditloom.training.learner import STUDENT, Learner
from ditloom.training.objectives.denoise import Denoise
from ditloom.training.optim import AdamW
from ditloom.training.schedules import Constant
from ditloom.training.step import Phase

BATCH, RUNS, RATE = 4, 8, 1e-4
PASSES = {"eager": 1, "frozen": 1, "training": 3}
"""Ours, and how many forwards' worth of multiply-accumulates each is: a backward pass has two."""
RIVALS = {"eager": ("diffusers", "cast"), "frozen": ("diffusers", "cast"), "training": ("diffusers training",)}

Contenders = dict[str, Callable[[], object]]


def measured(config: BackboneConfig, peer: Peer | None) -> dict[str, Any]:
    """Images per second of all; for ours the share of bare products' speed and how often faster than theirs."""
    net, layout = on_paper(config)
    macs, found = net.macs(layout), dict[str, dict[str, float]]()
    for contenders in (forward_contenders, training_contenders):
        times = interleaved({**contenders(config, peer), "products": products}, RUNS, clock=clock())
        floor = times.pop("products")
        for name, timing in times.items():
            found[name] = {"img/s": BATCH / timing.median, **compared(name, times)}
            if name in PASSES:
                found[name]["of floor"] = PASSES[name] * BATCH * macs / PRODUCT_MACS * ratios(floor, timing)
    sizes = {"parameters": net.learned_parameters(), "gmacs": macs / 1e9, "tokens": layout.length()}
    return {**sizes, "times": found}


def compared(name: str, times: Mapping[str, Timing]) -> dict[str, float]:
    """Their time over ours, by rival."""
    rivals = (rival for rival in RIVALS.get(name, ()) if rival in times)
    return {f"over {rival}": ratios(times[rival], times[name]) for rival in rivals}


def forward_contenders(config: BackboneConfig, peer: Peer | None) -> Contenders:
    """What takes turns in inference: ours in bf16, theirs under autocast and with weights cast to bf16."""
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
    contenders: Contenders = {"training": partial(step, x, noise, t, condition)}
    if peer is not None and theirs is not None:
        contenders["diffusers training"] = their_step(theirs, peer.arguments(config, x, t, condition))
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
