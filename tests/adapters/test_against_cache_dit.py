"""DBCache of cache-dit beside ours on the same transformer, where that package is installed: step by step the same.

Its F1B0 without warm-up is first-block caching. With two lists of blocks (FLUX, HunyuanVideo) it decides for each list
by itself, which ours does not; so only transformers of one list are compared.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.adapters.test_against_diffusers import STEPS, alike, measured, ours, query, walk
from tests.adapters.tiny import CASES

library = pytest.importorskip("cache_dit")


@pytest.mark.parametrize("name", ["wan", "pixart"])
def test_dbcache(name: str) -> None:
    case = CASES[name]
    threshold = 0.9 * max(measured(case))
    mine = ours(case, f"dbcache:threshold={threshold},first=1,last=0,warmup=0", query(case, 2))
    module, calls = copy.deepcopy(case.module), [0]
    config = library.DBCacheConfig(
        num_inference_steps=STEPS,
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=threshold,
        max_warmup_steps=0,
        enable_separate_cfg=False,
    )
    watched = getattr(module, case.lists[0])[2].attn1.to_q
    watched.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    library.enable_cache(module, cache_config=config)
    outputs: list[Tensor] = []
    computed: list[bool] = []
    with torch.no_grad():
        for x, t in zip(*walk(case), strict=True):
            before = calls[0]
            outputs.append(module(**case.arguments(x, t, (0,)), return_dict=False)[0])
            computed.append(calls[0] > before)
    alike(mine, (outputs, computed))
