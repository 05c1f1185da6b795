"""State dicts of feizc/DiT-MoE: dit_moe_s_8E2A.pt and the other released sizes.

The large models were written with flash attention, whose projections have other names (and norms of queries and keys).
"""

from __future__ import annotations

from typing import Any, ClassVar

from ditloom.backbones import dit_moe
from ditloom.backbones.dit_moe import DiTMoEConfig
from ditloom.contracts.registry import register
from ditloom.contracts.time import DISCRETE_1000, FLOW
from ditloom.hub.format import Foreign, Format
from ditloom.hub.formats.facebook_dit import MODULATIONS, POSITIONS, REST, read_sizes
from ditloom.hub.keymap import Experts, Fuse, KeyMap, Move


def _normed(config: Any) -> range:
    return range(config.depth if config.qk_norm else 0)


@register("dit-moe", paper="Scaling Diffusion Transformers to 16 Billion Parameters, arXiv 2407.11633")
class DiTMoEStateDict(Format):
    """Released checkpoints and what train.py of that repository writes."""

    family: ClassVar[str] = "dit-moe"
    keymap: ClassVar[KeyMap] = KeyMap(
        POSITIONS,
        Move("blocks.{i}.moe.gate.weight", "blocks.{i}.mlp.router.weight"),
        Experts(
            tuple(f"blocks.{{i}}.moe.experts.{{e}}.{m}_proj.weight" for m in ("gate", "up")),
            "blocks.{i}.mlp.experts.w12",
        ),
        Experts(("blocks.{i}.moe.experts.{e}.down_proj.weight",), "blocks.{i}.mlp.experts.w3"),
        Fuse(
            tuple(f"blocks.{{i}}.moe.shared_experts.{m}_proj.weight" for m in ("gate", "up")),
            "blocks.{i}.mlp.shared.w12.weight",
        ),
        Move("blocks.{i}.moe.shared_experts.down_proj.weight", "blocks.{i}.mlp.shared.w3.weight"),
        Move("blocks.{i}.attn.Wqkv.{p}", "blocks.{i}.attn.qkv.{p}", where=_normed),
        Move("blocks.{i}.attn.out_proj.{p}", "blocks.{i}.attn.proj.{p}", where=_normed),
        *MODULATIONS,
        REST,
    )

    def recognises(self, foreign: Foreign) -> bool:
        return "blocks.0.moe.gate.weight" in foreign.tensors

    def config(self, foreign: Foreign) -> DiTMoEConfig:
        """Whether it was trained as a rectified flow no tensor shows: as published, the ones with QK norm were."""
        sizes = read_sizes(foreign, dit_moe.PRESETS, "DiT-MoE")
        hidden = foreign.shape("blocks.0.moe.experts.0.gate_proj.weight")[0]
        normed = "blocks.0.attn.q_norm.weight" in foreign.tensors
        return DiTMoEConfig(
            **sizes,
            mlp_ratio=hidden / sizes["width"],
            experts=foreign.shape("blocks.0.moe.gate.weight")[0],
            shared_experts=foreign.shape("blocks.0.moe.shared_experts.gate_proj.weight")[0] // sizes["width"],
            qk_norm=normed,
            flow=normed,
            time=FLOW if normed else DISCRETE_1000,
        )
