"""Multiply-accumulates of the parts, counted from the modules themselves."""

from __future__ import annotations

from torch import nn


def linear(module: nn.Module, tokens: int) -> int:
    """A linear layer (or whatever stands in its place and knows its own cost) over `tokens` rows."""
    own = getattr(module, "macs_per_token", None)
    if own is not None:
        return int(own) * tokens
    return int(module.in_features) * int(module.out_features) * tokens  # type: ignore[arg-type]


def linears(module: nn.Module, tokens: int) -> int:
    """Every linear layer inside `module`, each over `tokens` rows."""
    return sum(linear(m, tokens) for m in module.modules() if isinstance(m, nn.Linear))


def attention(queries: int, keys: int, width: int) -> int:
    """The two matrix products of softmax attention over all heads."""
    return 2 * queries * keys * width


def convolution(module: nn.Conv2d, positions: int) -> int:
    """A convolution evaluated at `positions` output positions."""
    kernel = module.kernel_size[0] * module.kernel_size[1]
    return module.in_channels // module.groups * module.out_channels * kernel * positions
