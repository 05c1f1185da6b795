"""State dicts of alibaba-damo-academy/DyDiT (DyDiT/models.py): those of DiT, with three routers in every block."""

from __future__ import annotations

from typing import Any, ClassVar

from ditloom.backbones import dit
from ditloom.backbones.dydit import DyDiTConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format
from ditloom.hub.formats.facebook_dit import MODULATIONS, POSITIONS, REST, read_sizes
from ditloom.hub.keymap import KeyMap, Move


@register("dydit", paper="Dynamic Diffusion Transformer, arXiv 2410.03456")
class DyDiTStateDict(Format):
    """What train.py of that repository writes."""

    family: ClassVar[str] = "dydit"
    keymap: ClassVar[KeyMap] = KeyMap(
        POSITIONS,
        *MODULATIONS,
        Move("blocks.{i}.attn_rate.router.{p}", "blocks.{i}.head_router.linear.{p}"),
        Move("blocks.{i}.mlp_rate.router.{p}", "blocks.{i}.group_router.linear.{p}"),
        Move("blocks.{i}.token_selection.mlp_head.{rest}", "blocks.{i}.token_router.mlp.{rest}"),
        REST,
    )

    def recognises(self, foreign: Foreign) -> bool:
        return {
            "blocks.0.attn_rate.router.weight",
            "blocks.0.token_selection.mlp_head.0.weight",
        } <= foreign.tensors.keys()

    def config(self, foreign: Foreign) -> DyDiTConfig:
        heads = foreign.shape("blocks.0.attn_rate.router.weight")[0] + 1
        sizes: dict[str, Any] = read_sizes(foreign, dit.PRESETS, "DyDiT", heads)
        return DyDiTConfig(**sizes, mlp_ratio=foreign.shape("blocks.0.mlp.fc1.weight")[0] / sizes["width"])
