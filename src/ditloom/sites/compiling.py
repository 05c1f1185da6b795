"""Compile a backbone one block call at a time, in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ditloom.contracts.backbone import Backbone


def compile_blocks(backbone: Backbone, plans: int = 1, *, frozen: bool = False, **options: Any) -> int:
    """Compile every block; graphs = block kinds x block plans x shapes. Returns how many to expect per shape.

    `plans`: distinct block plans; a run announces its own number (`Program.static_plans`) before it starts.
    frozen: for inference alone; weights become constants that are laid out once for the processor's matrix products,
    which takes their memory again, one graph per block instead of per kind, and sees no later change of a weight.
    """
    if frozen:
        backbone.eval().requires_grad_(False)
    backbone.frozen = frozen
    if options.get("backend", "inductor") == "inductor":
        keep_layouts()
    for block in backbone.blocks:
        block.compile(fullgraph=True, dynamic=False, **options)
        if frozen:
            block._compiled_call_impl = traced_frozen(block._compiled_call_impl)
    return announce(backbone, plans)


@cache
def keep_layouts() -> None:
    """Gradients of convolutions over tokens stay channels-last: inductor copies what a backward pass hands to a kernel
    of torch's into the contiguous layout, in which depthwise convolutions take five times as long."""
    from torch._inductor.lowering import constrain_to_fx_strides, make_fallback

    backward = torch.ops.aten.convolution_backward
    make_fallback(backward, constrain_to_fx_strides, warn=False, override_decomp=True)
    torch.compiler.config.cache_key_tag += " channels-last"  # graphs that were cached without it are others


def traced_frozen(call: Any) -> Callable[..., Any]:
    """A compiled call during which freezing is on: the tracer does not read it from the options of `compile`."""
    config: Any = torch._inductor.config

    def traced(*args: Any, **kwargs: Any) -> Any:
        before, config.freezing = config.freezing, True
        try:
            return call(*args, **kwargs)
        finally:
            config.freezing = before

    return traced


def announce(backbone: Backbone, plans: int) -> int:
    """Raise the recompile limit to hold so many plans of compiled blocks, in eight shapes each."""
    kinds = len(backbone.blocks if backbone.frozen else {type(block) for block in backbone.blocks})
    expected = kinds * max(plans, 1)
    if any(block._compiled_call_impl is not None for block in backbone.blocks):
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, 8 * expected)
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 64 * expected)
    return expected
