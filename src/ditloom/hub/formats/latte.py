"""State dicts of Vchitect/Latte (models/latte.py): unconditional or class-conditional.

Its position tables are stored; ours are computed. Block 1 of ours holds the positions of frames and has no tensors.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ditloom.backbones import latte
from ditloom.backbones.latte import LatteConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, known_heads, split_null, square_side
from ditloom.hub.keymap import FRAME, Derived, KeyMap, Move
from ditloom.parts.positions import grid_positions, sincos_1d, sincos_at


def _places(config: LatteConfig) -> Tensor:
    side = config.image_size // config.patch
    return sincos_at(grid_positions(side, side), config.width).float()[None]


def _frames(config: LatteConfig) -> Tensor:
    return sincos_1d(grid_positions(config.frames)[:, 0], config.width).float()[None]


def _first(config: Any) -> range:
    return range(1)


def _others(config: Any) -> range:
    return range(1, config.depth + 1)


def _block(theirs: str, ours: str) -> tuple[Move, Move]:
    """A tensor of every block: of the first one, and of those behind the positions of frames."""
    theirs, ours = f"blocks.{{i}}.{theirs}", f"blocks.{{i}}.{ours}"
    return Move(theirs, ours, where=_first), Move(theirs, ours, where=_others, from_zero=True)


@register("latte", paper="Latte: Latent Diffusion Transformer for Video Generation, arXiv 2401.03048")
class LatteStateDict(Format):
    """ucf101.pt, ffs.pt and what train.py of that repository writes."""

    family: ClassVar[str] = "latte"
    keymap: ClassVar[KeyMap] = KeyMap(
        Derived("pos_embed", _places, "sine-cosine position table"),
        Derived("temp_embed", _frames, "sine-cosine table of frames"),
        Move("x_embedder.proj.{p}", "x_embedder.proj.{p}", FRAME),
        *_block("adaLN_modulation.1.{p}", "modulation.linear.{p}"),
        *_block("{rest}", "{rest}"),
        Move("final_layer.adaLN_modulation.1.{p}", "final_layer.modulation.linear.{p}"),
        Move("{rest}", "{rest}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        return {"temp_embed", "pos_embed", "blocks.0.adaLN_modulation.1.weight"} <= foreign.tensors.keys()

    def config(self, foreign: Foreign) -> LatteConfig:
        width, channels, patch, _ = foreign.shape("x_embedder.proj.weight")
        depth = foreign.count(r"blocks\.(\d+)\.")
        classes, null = 0, True
        if "y_embedder.embedding_table.weight" in foreign.tensors:
            classes, null = split_null(foreign.shape("y_embedder.embedding_table.weight")[0])
        return LatteConfig(
            depth=depth,
            width=width,
            heads=known_heads(latte.PRESETS, depth, width, "Latte"),
            patch=patch,
            image_size=square_side(foreign.shape("pos_embed")[1], "pos_embed") * patch,
            frames=foreign.shape("temp_embed")[1],
            channels=channels,
            classes=classes,
            null_class=null,
            learn_sigma=foreign.shape("final_layer.linear.weight")[0] == 2 * channels * patch**2,
            mlp_ratio=foreign.shape("blocks.0.mlp.fc1.weight")[0] / width,
        )
