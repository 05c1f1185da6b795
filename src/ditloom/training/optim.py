"""Optimisers, their parameter groups, and gradient clipping."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

FUSED_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam (Kingma & Ba 2015), fused where the device has it.

    `scales` multiplies the rate of parameters by the first pattern that matches their name, as muP needs.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    scales: Mapping[str, float] = field(default_factory=dict)

    def build(self, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """The optimiser over named parameters; groups carry `scale`, a factor on the scheduled rate."""
        groups = parameter_groups(parameters, 0.0, self.scales)
        return torch.optim.Adam(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=_fused(parameters))


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019); biases, gains and other vectors do not decay."""

    weight_decay: float = 0.0

    def build(self, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        groups = parameter_groups(parameters, self.weight_decay, self.scales)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=_fused(parameters))


OPTIMISERS = {"adamw": AdamW, "adam": Adam}


def parameter_groups(
    parameters: Mapping[str, Tensor], weight_decay: float, scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Groups of parameters with equal decay and rate scale, in order of first appearance."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        decay = weight_decay if parameter.ndim > 1 else 0.0
        scale = next((s for pattern, s in scales.items() if fnmatch.fnmatchcase(name, pattern)), 1.0)
        fresh: dict[str, Any] = {"params": [], "weight_decay": decay, "scale": scale}
        groups.setdefault((decay, scale), fresh)["params"].append(parameter)
    return list(groups.values())


def _fused(parameters: Mapping[str, Tensor]) -> bool:
    return all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters.values())


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group `rate` times its scale."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["scale"]


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scale gradients so that their joint norm is at most `limit`; returns the norm before, of all ranks' shards."""
    present = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in present])  # type: ignore[misc]
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if limit is not None:
        nn.utils.clip_grads_with_norm_(present, limit, norm)
    return norm


def state_tensors(optimiser: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimiser's state as named tensors, `<parameter>.<slot>`; rates follow from image counts, none is kept."""
    return {
        f"{name}.{slot}": value
        for name, parameter in parameters.items()
        for slot, value in optimiser.state.get(parameter, {}).items()
    }


def load_state(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Continue from a copy of `state_tensors`; slots of sharded parameters must come sharded like them."""
    slots: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, slot = key.rsplit(".", 1)
        slots.setdefault(name, {})[slot] = value.clone()
    names = {id(parameter): name for name, parameter in parameters.items()}
    ordered = [names[id(p)] for group in optimiser.param_groups for p in group["params"]]
    packed = optimiser.state_dict()
    packed["state"] = {i: slots[name] for i, name in enumerate(ordered) if name in slots}
    optimiser.load_state_dict(packed)
