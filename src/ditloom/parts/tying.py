"""Parts that several blocks share: held once by their owner, so that they are stored, counted and updated once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def tie(blocks: Sequence[nn.Module], path: str) -> nn.Module:
    """Take the submodule at `path` of the first block and lend it to all; whoever called this must hold it.

    A block can use what it is lent but does not own it: it is among the modules and in the state dict of its owner
    alone.
    """
    shared = blocks[0].get_submodule(path)
    parent, _, name = path.rpartition(".")
    for block in blocks:
        holder = block.get_submodule(parent)
        delattr(holder, name)
        object.__setattr__(holder, name, shared)
    return shared
