"""State dicts of Open-Sora 1.2's STDiT3 (hpcai-tech/OpenSora-STDiT-v3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditloom.backbones.stdit import STDiTConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format
from ditloom.hub.formats.stdit import INSIDE, SHARED
from ditloom.hub.keymap import Derived, KeyMap, Move, Placed


def _frequencies(config: STDiTConfig) -> Tensor:
    head = config.width // config.heads
    return 1.0 / 10000.0 ** (torch.arange(0, head, 2).float() / head)


def _places(config: Any) -> Mapping[int, Mapping[str, Any]]:
    """Our flat position to their list and number."""
    return {i: {"of": ("spatial_blocks", "temporal_blocks")[i % 2], "n": i // 2} for i in range(config.depth)}


def _block(theirs: str, ours: str) -> Placed:
    return Placed(f"{{of}}.{{n}}.{theirs}", f"blocks.{{i}}.{ours}", places=_places)


@register("stdit3", paper="Open-Sora: Democratizing Efficient Video Production for All, arXiv 2412.20404")
class STDiT3StateDict(Format):
    """With norms of queries and keys, as released."""

    family: ClassVar[str] = "stdit"
    keymap: ClassVar[KeyMap] = KeyMap(
        Derived("rope.freqs", _frequencies, "table of rotary frequencies"),
        *SHARED,
        *(_block(theirs, ours) for theirs, ours in INSIDE.items()),
        _block("{rest}", "{rest}"),
        Move("{rest}", "{rest}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        needed = {"spatial_blocks.0.attn.qkv.weight", "temporal_blocks.0.attn.qkv.weight", "fps_embedder.mlp.0.weight"}
        return needed <= foreign.tensors.keys()

    def config(self, foreign: Foreign) -> STDiTConfig:
        width, channels, *patch = foreign.shape("x_embedder.proj.weight")
        tokens, text_width = foreign.shape("y_embedder.y_embedding")
        return STDiTConfig(
            depth=2 * foreign.count(r"spatial_blocks\.(\d+)\."),
            width=width,
            heads=width // foreign.shape("spatial_blocks.0.attn.q_norm.weight")[0],
            patch=(patch[0], patch[1], patch[2]),
            size=(15, 30, 52),
            channels=channels,
            text_width=text_width,
            text_tokens=tokens,
            learn_sigma=foreign.shape("final_layer.linear.weight")[0] == 2 * channels * math.prod(patch),
            mlp_ratio=foreign.shape("spatial_blocks.0.mlp.fc1.weight")[0] / width,
            null_tokens=tokens,
        )
