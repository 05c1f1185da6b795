"""Compile a backbone one block call at a time, in place."""

from __future__ import annotations

from typing import Any

import torch

from ditloom.contracts.backbone import Backbone


def compile_blocks(backbone: Backbone, plans: int = 1, **options: Any) -> int:
    """Compile every block; graphs = block kinds x block plans x shapes. Returns how many to expect per shape.

    `plans`: distinct block plans a run announces (`Program.static_plans`). The recompile limit is raised to hold them.
    """
    kinds = len({type(block) for block in backbone.blocks})
    expected = kinds * max(plans, 1)
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 8 * expected)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 64 * expected)
    for block in backbone.blocks:
        block.compile(fullgraph=True, dynamic=False, **options)
    return expected
