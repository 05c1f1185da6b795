"""State dicts of Open-Sora 1.0's STDiT; its position tables are stored, ours are computed."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from ditloom.backbones import stdit
from ditloom.backbones.stdit import STDiTConfig
from ditloom.contracts.registry import register
from ditloom.contracts.time import DISCRETE_1000
from ditloom.hub.format import Foreign, Format, known_heads
from ditloom.hub.keymap import Derived, KeyMap, Move
from ditloom.parts.positions import grid_positions, sincos_1d, sincos_at

BLOCK = "blocks.{i}."
SHARED = (
    Move("t_block.1.{p}", "modulation.linear.{p}"),
    Move("y_embedder.y_proj.{rest}", "text_embedder.{rest}"),
    Move("y_embedder.y_embedding", "null_text"),
    Move("final_layer.scale_shift_table", "final_layer.modulation.table"),
)
INSIDE = {
    "scale_shift_table": "modulation.table",
    "cross_attn.q_linear.{p}": "cross.q.{p}",
    "cross_attn.kv_linear.{p}": "cross.kv.{p}",
    "cross_attn.proj.{p}": "cross.proj.{p}",
}


def _places(config: STDiTConfig) -> Tensor:
    grid = (config.size[1] // config.patch[1], config.size[2] // config.patch[2])
    return sincos_at(grid_positions(*grid) / config.space_scale, config.width).float()[None]


def _frames(config: STDiTConfig) -> Tensor:
    frames = torch.arange(config.size[0] // config.patch[0], dtype=torch.float64)
    return sincos_1d(frames / config.time_scale, config.width).float()[None]


@register("stdit", paper="Open-Sora: Democratizing Efficient Video Production for All, arXiv 2412.20404")
class STDiTStateDict(Format):
    """OpenSora-v1-16x256x256.pth and what train.py of v1.0 writes. Tables of square pictures tell size and scales."""

    family: ClassVar[str] = "stdit"
    keymap: ClassVar[KeyMap] = KeyMap(
        Derived("pos_embed", _places, "sine-cosine position table"),
        Derived("pos_embed_temporal", _frames, "sine-cosine table of frames"),
        *SHARED,
        *(Move(BLOCK + theirs, BLOCK + ours) for theirs, ours in INSIDE.items()),
        Move(BLOCK + "attn_temp.{rest}", BLOCK + "attn_time.{rest}"),
        Move("{rest}", "{rest}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        return {"pos_embed_temporal", "blocks.0.attn_temp.qkv.weight", "t_block.1.weight"} <= foreign.tensors.keys()

    def config(self, foreign: Foreign) -> STDiTConfig:
        width, channels, *patch = foreign.shape("x_embedder.proj.weight")
        depth = foreign.count(r"blocks\.(\d+)\.")
        tokens, text_width = foreign.shape("y_embedder.y_embedding")
        places, frames = foreign.tensors["pos_embed"][0], foreign.tensors["pos_embed_temporal"][0]
        side = math.isqrt(len(places))
        return STDiTConfig(
            version=1,
            depth=depth,
            width=width,
            heads=known_heads(stdit.PRESETS, depth, width, "STDiT"),
            patch=(patch[0], patch[1], patch[2]),
            size=(len(frames) * patch[0], side * patch[1], side * patch[2]),
            channels=channels,
            text_width=text_width,
            text_tokens=tokens,
            learn_sigma=foreign.shape("final_layer.linear.weight")[0] == 2 * channels * math.prod(patch),
            mlp_ratio=foreign.shape("blocks.0.mlp.fc1.weight")[0] / width,
            space_scale=_scale(places[1, : width // 2]) if side > 1 else 1.0,
            time_scale=_scale(frames[1]) if len(frames) > 1 else 1.0,
            null_tokens=tokens,
            time=DISCRETE_1000,
        )


def _scale(second: Tensor) -> float:
    """By what positions were divided: the second token's [sines, cosines] begin with the angle 1 / scale."""
    sine, cosine = float(second[0]), float(second[len(second) // 2])
    return round(1 / (math.atan2(sine, cosine) % math.tau), 4)
