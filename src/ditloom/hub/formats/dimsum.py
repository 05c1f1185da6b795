"""State dicts of VinAIResearch/DiMSUM (dimsum/models_dim.py, block type "combined"), with its stored filters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ditloom.backbones.dimsum import DiMSUMConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, split_null, square_side
from ditloom.hub.formats.dis import mamba_names
from ditloom.hub.keymap import Derived, KeyMap, Move, Placed, Tensors
from ditloom.parts.wavelet import HAAR

BANDS = ("ll", "lh", "hl", "hh")


def _places(config: Any) -> Mapping[int, Mapping[str, str]]:
    """Their number of every flat position that is not the shared block's."""
    positions = (k + k // config.every for k in range(config.depth))
    return {position: {"place": f"blocks.{k}"} for k, position in enumerate(positions)}


def _at(theirs: str, ours: str) -> Placed:
    return Placed("{place}." + theirs, "blocks.{i}." + ours, places=_places)


def _scan(theirs: str, ours: str) -> list[Placed]:
    """One half's scan."""
    return [
        *(_at(f"{theirs}.mixer.{their}", f"{ours}.mixer.{our}") for their, our in mamba_names("ahead", "")),
        _at(f"{theirs}.mixer.cond_proj.{{p}}", f"{ours}.before.{{p}}"),
        _at(f"{theirs}.mixer.{{rest}}", f"{ours}.mixer.{{rest}}"),
        _at(f"{theirs}.adaLN_modulation.1.{{p}}", f"{ours}.modulation.linear.{{p}}"),
    ]


@dataclass(frozen=True)
class Filters(Derived):
    """The Haar filters, which they store in every block."""

    def added(self, config: Any) -> Tensors:
        filters = torch.tensor(HAAR, dtype=torch.float32).reshape(4, 1, 2, 2) / 2
        found: Tensors = {}
        for k in range(config.depth):
            place = f"blocks.{k}.freq_mamba"
            found |= {f"{place}.dwt.w_{band}": f[None] for band, f in zip(BANDS, filters, strict=True)}
            found[f"{place}.idwt.filters"] = filters
        return found


@register("dimsum", paper="DiMSUM: Diffusion Mamba, arXiv 2411.04168")
class DiMSUMStateDict(Format):
    """A released checkpoint, or the "ema" of a training run. Weights do not tell the heads nor how often the shared
    block comes: they are read as released (16, 8, every 4) unless a configuration is given."""

    family: ClassVar[str] = "dimsum"
    keymap: ClassVar[KeyMap] = KeyMap(
        Filters("freq_mamba", lambda config: None, "Haar filter"),
        _at("norm.weight", "norm1.weight"),
        _at("norm_2.weight", "norm2.weight"),
        *_scan("spatial_mamba", "spatial"),
        *_scan("freq_mamba", "frequency"),
        _at("proj.qkv1.{p}", "fusion.first.qkv.{p}"),
        _at("proj.qkv2.{p}", "fusion.second.qkv.{p}"),
        _at("proj.proj.{p}", "fusion.proj.{p}"),
        _at("adaLN_modulation.1.{p}", "modulation.linear.{p}"),
        _at("mlp.{rest}", "mlp.{rest}"),
        Move("attn_block.adaLN_modulation.1.{p}", "shared.modulation.linear.{p}"),
        Move("attn_block.{rest}", "shared.{rest}"),
        Move("final_layer.adaLN_modulation.1.{p}", "final_layer.modulation.linear.{p}"),
        Move("{rest}", "{rest}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        return {"blocks.0.freq_mamba.mixer.A_log", "blocks.0.spatial_mamba.mixer.A_log"} <= foreign.tensors.keys()

    def config(self, foreign: Foreign) -> DiMSUMConfig:
        width, channels, patch, _ = foreign.shape("x_embedder.proj.weight")
        classes, null = split_null(foreign.shape("y_embedder.embedding_table.weight")[0])
        depth = foreign.count(r"blocks\.(\d+)\.")
        return DiMSUMConfig(
            depth=depth,
            width=width,
            every=DiMSUMConfig.every if "attn_block.attn.qkv.weight" in foreign.tensors else depth + 1,
            patch=patch,
            image_size=patch * square_side(foreign.shape("pos_embed")[1], "pos_embed"),
            channels=channels,
            classes=classes,
            null_class=null,
            mlp_ratio=foreign.shape("blocks.0.mlp.w3.weight")[1] / width,
            states=foreign.shape("blocks.0.spatial_mamba.mixer.A_log")[1],
        )
