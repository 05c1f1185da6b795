"""diffusers' SD3Transformer2DModel (Stable Diffusion 3 and 3.5): a folder of config.json and weights.

Its last norms store (scale, shift) where ours store (shift, scale).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from ditloom.backbones.mmdit import MMDiTConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, refuse_unless, square_side
from ditloom.hub.keymap import FLAT, SWAP, Fuse, KeyMap, Move

BLOCK = "transformer_blocks.{i}."
CLASS = "diffusers' SD3Transformer2DModel"
HEAD = 64


def _last(config: Any) -> range:
    return range(config.depth - 1, config.depth)


@register("diffusers-sd3", paper="Scaling Rectified Flow Transformers, arXiv 2403.03206")
class DiffusersSD3(Format):
    """SD3-medium, SD3.5-medium and SD3.5-large, and any MMDiT of ours with a pooled vector."""

    family: ClassVar[str] = "mmdit"
    folder: ClassVar[bool] = True
    keymap: ClassVar[KeyMap] = KeyMap(
        Move("pos_embed.proj.{p}", "x_embedder.proj.{p}"),
        Move("pos_embed.pos_embed", "pos_embed.table", FLAT),
        Move("time_text_embed.timestep_embedder.linear_1.{p}", "t_embedder.mlp.0.{p}"),
        Move("time_text_embed.timestep_embedder.linear_2.{p}", "t_embedder.mlp.2.{p}"),
        Move("time_text_embed.text_embedder.linear_1.{p}", "pooled_embedder.mlp.0.{p}"),
        Move("time_text_embed.text_embedder.linear_2.{p}", "pooled_embedder.mlp.2.{p}"),
        Move("context_embedder.{p}", "text_embedder.{p}"),
        Move(BLOCK + "norm1.linear.{p}", "blocks.{i}.image.modulation.linear.{p}"),
        Move(BLOCK + "norm1_context.linear.{p}", "blocks.{i}.text.modulation.linear.{p}", SWAP, where=_last),
        Move(BLOCK + "norm1_context.linear.{p}", "blocks.{i}.text.modulation.linear.{p}"),
        Fuse(tuple(BLOCK + f"attn.to_{x}.{{p}}" for x in "qkv"), "blocks.{i}.image.attn.qkv.{p}"),
        Fuse(tuple(BLOCK + f"attn.add_{x}_proj.{{p}}" for x in "qkv"), "blocks.{i}.text.attn.qkv.{p}"),
        Fuse(tuple(BLOCK + f"attn2.to_{x}.{{p}}" for x in "qkv"), "blocks.{i}.attn2.qkv.{p}"),
        Move(BLOCK + "attn.to_out.0.{p}", "blocks.{i}.image.attn.proj.{p}"),
        Move(BLOCK + "attn.to_add_out.{p}", "blocks.{i}.text.attn.proj.{p}"),
        Move(BLOCK + "attn2.to_out.0.{p}", "blocks.{i}.attn2.proj.{p}"),
        *(Move(BLOCK + f"attn.norm_{x}.weight", f"blocks.{{i}}.image.attn.{x}_norm.weight") for x in "qk"),
        *(Move(BLOCK + f"attn.norm_added_{x}.weight", f"blocks.{{i}}.text.attn.{x}_norm.weight") for x in "qk"),
        *(Move(BLOCK + f"attn2.norm_{x}.weight", f"blocks.{{i}}.attn2.{x}_norm.weight") for x in "qk"),
        Move(BLOCK + "ff.net.0.proj.{p}", "blocks.{i}.image.mlp.fc1.{p}"),
        Move(BLOCK + "ff.net.2.{p}", "blocks.{i}.image.mlp.fc2.{p}"),
        Move(BLOCK + "ff_context.net.0.proj.{p}", "blocks.{i}.text.mlp.fc1.{p}"),
        Move(BLOCK + "ff_context.net.2.{p}", "blocks.{i}.text.mlp.fc2.{p}"),
        Move("norm_out.linear.{p}", "final_layer.modulation.linear.{p}", SWAP),
        Move("proj_out.{p}", "final_layer.linear.{p}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        tops = {key.partition(".")[0] for key in foreign.tensors}
        return {"transformer_blocks", "time_text_embed", "context_embedder", "pos_embed"} <= tops

    def config(self, foreign: Foreign) -> MMDiTConfig:
        keys, given = foreign.tensors, foreign.settings
        width, channels, patch, _ = foreign.shape("pos_embed.proj.weight")
        norm = "transformer_blocks.0.attn.norm_q.weight"
        head = given.get("attention_head_dim") or (foreign.shape(norm)[0] if norm in keys else HEAD)
        depth = foreign.count(r"transformer_blocks\.(\d+)\.")
        table = square_side(foreign.shape("pos_embed.pos_embed")[1], "pos_embed.pos_embed")
        span = _span(foreign, table)
        return MMDiTConfig(
            depth=depth,
            width=width,
            heads=width // head,
            patch=patch,
            image_size=given.get("sample_size", span * patch),
            channels=channels,
            text_width=foreign.shape("context_embedder.weight")[1],
            pooled_width=foreign.shape("time_text_embed.text_embedder.linear_1.weight")[1],
            qk_norm="rms" if norm in keys else None,
            dual=tuple(i for i in range(depth) if f"transformer_blocks.{i}.attn2.to_q.weight" in keys),
            table=table,
            table_span=span,
            mlp_ratio=foreign.shape("transformer_blocks.0.ff.net.0.proj.weight")[0] / width,
        )

    def settings(self, config: MMDiTConfig) -> dict[str, Any]:
        refuse_unless(config, CLASS, mlp_ratio=4.0)
        if not config.pooled_width:
            refuse_unless(config, CLASS, pooled_width="any width above 0")
        return {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": config.image_size,
            "patch_size": config.patch,
            "in_channels": config.channels,
            "out_channels": config.channels,
            "num_layers": config.depth,
            "attention_head_dim": config.width // config.heads,
            "num_attention_heads": config.heads,
            "joint_attention_dim": config.text_width,
            "caption_projection_dim": config.width,
            "pooled_projection_dim": config.pooled_width,
            "pos_embed_max_size": config.table,
            "dual_attention_layers": list(config.dual),
            "qk_norm": "rms_norm" if config.qk_norm else None,
        }


def _span(foreign: Foreign, table: int) -> int:
    """Up to which coordinate the table runs: its second token holds sin(span / table) at frequency 1."""
    second = float(foreign.tensors["pos_embed.pos_embed"][0, 1, 0])
    return max(1, round(math.asin(min(1.0, max(0.0, second))) * table))
