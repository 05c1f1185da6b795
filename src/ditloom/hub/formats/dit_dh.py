"""State dicts of bytetriper/RAE, stage 2 (src/stage2/models/DDT.py: DiTwDDTHead)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ditloom.backbones.dit_dh import DiTDHConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, split_null, square_side
from ditloom.hub.formats.facebook_dit import MODULATIONS, POSITIONS, REST
from ditloom.hub.keymap import Derived, KeyMap, Move
from ditloom.parts.positions import axial_axes, grid_positions, rotary


def _table(config: DiTDHConfig, size: tuple[int, int], part: int) -> Tensor:
    side = config.image_size // config.patch
    return rotary(grid_positions(side, side), axial_axes(size[0] // size[1]), config.theta)[part]


def _encoder(config: DiTDHConfig) -> tuple[int, int]:
    return config.width, config.heads


def _first_of_head(config: Any) -> range:
    return range(config.depth, config.depth + 1)


@register("dit-dh", paper="Diffusion Transformers with Representation Autoencoders, arXiv 2510.11690")
class DiTDHStateDict(Format):
    """stage2_model.pt, and what train.py of that repository writes."""

    family: ClassVar[str] = "dit-dh"
    keymap: ClassVar[KeyMap] = KeyMap(
        POSITIONS,
        Derived("enc_feat_rope.freqs_cos", lambda c: _table(c, _encoder(c), 0), "rotary table"),
        Derived("enc_feat_rope.freqs_sin", lambda c: _table(c, _encoder(c), 1), "rotary table"),
        Derived("dec_feat_rope.freqs_cos", lambda c: _table(c, c.head_size, 0), "rotary table"),
        Derived("dec_feat_rope.freqs_sin", lambda c: _table(c, c.head_size, 1), "rotary table"),
        *MODULATIONS,
        Move("s_projector.{p}", "blocks.{i}.project.{p}", where=_first_of_head),
        Move("final_layer.norm_final.{p}", "final_layer.norm.{p}"),
        REST,
    )

    def recognises(self, foreign: Foreign) -> bool:
        return {"s_embedder.proj.weight", "dec_feat_rope.freqs_cos", "t_embedder.W"} <= foreign.tensors.keys()

    def config(self, foreign: Foreign) -> DiTDHConfig:
        width, channels, patch, _ = foreign.shape("s_embedder.proj.weight")
        head_width = foreign.shape("x_embedder.proj.weight")[0]
        blocks = foreign.count(r"blocks\.(\d+)\.")
        widths = [foreign.shape(f"blocks.{i}.norm1.weight")[0] for i in range(blocks)]
        depth = widths.index(head_width) if head_width != width else blocks - 2
        classes, null = split_null(foreign.shape("y_embedder.embedding_table.weight")[0])
        return DiTDHConfig(
            depth=depth,
            width=width,
            heads=width // foreign.shape("enc_feat_rope.freqs_cos")[1],
            head_depth=blocks - depth,
            head_width=head_width,
            head_heads=head_width // foreign.shape("dec_feat_rope.freqs_cos")[1],
            patch=patch,
            image_size=square_side(foreign.shape("pos_embed")[1], "pos_embed") * patch,
            channels=channels,
            classes=classes,
            null_class=null,
        )
