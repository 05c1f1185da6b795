"""One matrix product per group of rows: what experts are made of.

The rows of x lie sorted by group; group e is x[ends[e - 1] : ends[e]] and has a weight matrix of its own. Only rows
that exist are multiplied, whatever the sizes of the groups. It is one operator to a compiler, so that sizes known only
at run time break no graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("ditloom::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [n, d], weight [E, out, d], ends [E] int32 to [n, out]."""
    if x.is_cuda and x.dtype is torch.bfloat16:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    y = x.new_empty(x.shape[0], weight.shape[1])
    for e, (start, end) in enumerate(_bounds(ends)):
        torch.mm(x[start:end], weight[e].T, out=y[start:end])
    return y


@torch.library.custom_op("ditloom::grouped_outer", mutates_args=())
def grouped_outer(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The weights' gradient: y [n, out], x [n, d], ends [E] to [E, out, d], the sum of y x^T over each group."""
    weight = y.new_zeros(len(ends), y.shape[1], x.shape[1])
    for e, (start, end) in enumerate(_bounds(ends)):
        torch.mm(y[start:end].T, x[start:end], out=weight[e])
    return weight


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_outer.register_fake
def _(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return y.new_empty(ends.shape[0], y.shape[1], x.shape[1])


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors  # type: ignore[attr-defined]
    wants_x, wants_weight, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
    grad = grad.contiguous()
    for_x = grouped_linear(grad, weight.transpose(1, 2).contiguous(), ends) if wants_x else None
    return for_x, grouped_outer(grad, x, ends) if wants_weight else None, None


grouped_linear.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@register_flop_formula([torch.ops.ditloom.grouped_linear, torch.ops.ditloom.grouped_outer])
def _flops(a: torch.Size, b: torch.Size, ends: torch.Size, *args: object, **kwargs: object) -> int:
    """Both multiply every row of the first with as many numbers as it has, once per feature of the other."""
    return 2 * a[0] * a[1] * b[1]


def _bounds(ends: Tensor) -> list[tuple[int, int]]:
    stops = ends.tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))
