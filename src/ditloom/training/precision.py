"""The dtype policy: the optimiser steps fp32 master weights, the network computes in one stated dtype.

No autocast: it casts weights and activations again at every operation. Here each weight is cast once after every
optimiser step, and everything between a block's input and output runs in the compute dtype. Statistics of norms,
sines of times and losses are taken in fp32 by the parts that own them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditloom.contracts.errors import UnknownName


@dataclass(frozen=True)
class Precision:
    """A named policy: what the network computes in. Masters, averages, optimiser state and losses are fp32."""

    name: str
    compute: torch.dtype


PRECISIONS = {
    "fp32": Precision("fp32", torch.float32),
    "bf16": Precision("bf16", torch.bfloat16),
}


def precision_of(name: str) -> Precision:
    """The policy of this name."""
    if name not in PRECISIONS:
        raise UnknownName("precision", name, PRECISIONS)
    return PRECISIONS[name]


class MasterWeights:
    """The fp32 weights of a network that computes with lower-precision copies of them.

    `named` holds one master per parameter. Where the parameter is already at least as wide as its master would be
    (fp32 training; sharded parameters, which FSDP2 casts itself) the master is the parameter and nothing is copied.
    """

    def __init__(self, module: nn.Module, compute: torch.dtype):
        self.named: dict[str, nn.Parameter] = {}
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._buffers: dict[nn.Parameter, Tensor] = {}
        for name, parameter in module.named_parameters():
            self.named[name] = self._master_of(parameter, compute)

    def _master_of(self, parameter: nn.Parameter, compute: torch.dtype) -> nn.Parameter:
        if not parameter.is_floating_point() or parameter.dtype.itemsize <= compute.itemsize:
            return parameter
        master = nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
        parameter.data = parameter.data.to(compute)
        self._pairs.append((master, parameter))
        return master

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The masters that are optimised."""
        return {name: master for name, master in self.named.items() if master.requires_grad}

    @torch.no_grad()
    def collect(self) -> None:
        """Add the copies' gradients to the masters', in fp32; call after every backward pass."""
        for first in (True, False):
            pairs = [(m, c) for m, c in self._pairs if c.grad is not None and (m.grad is None) is first]
            found = [copy.grad for _, copy in pairs if copy.grad is not None]
            if first:
                self._start([master for master, _ in pairs], found)
            elif pairs:
                totals = [master.grad for master, _ in pairs if master.grad is not None]
                torch._foreach_add_(totals, [gradient.float() for gradient in found])
            for _, copy in pairs:
                copy.grad = None

    def _start(self, masters: list[nn.Parameter], gradients: list[Tensor]) -> None:
        """The first gradients of a batch, written into buffers that are kept from batch to batch."""
        buffers = [self._buffer(master) for master in masters]
        if buffers:
            torch._foreach_copy_(buffers, gradients)
        for master, buffer in zip(masters, buffers, strict=True):
            master.grad = buffer

    def _buffer(self, master: nn.Parameter) -> Tensor:
        if master not in self._buffers:
            self._buffers[master] = torch.empty_like(master)
        return self._buffers[master]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the copies; call after every change of the masters."""
        if self._pairs:
            copies: list[Tensor] = [copy for _, copy in self._pairs]
            torch._foreach_copy_(copies, [master for master, _ in self._pairs])

    def forget_gradients(self) -> None:
        """Drop all gradients before the next batch."""
        for master in self.named.values():
            master.grad = None
