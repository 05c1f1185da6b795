"""diffusers' HunyuanDiT2DModel (Hunyuan-DiT v1.1 and v1.2): a folder of config.json and weights.

Its last norm stores (scale, shift) where ours stores (shift, scale). Its pipeline computes the rotary tables; for grids
that are not square it spaces coordinates a little differently from the official code, whose spacing is ours.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ditloom.backbones.hunyuan_dit import HunyuanDiTConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, refuse_unless
from ditloom.hub.keymap import SWAP, Fuse, KeyMap, Move

BLOCK = "blocks.{i}."
TIME = "time_extra_emb."
CLASS = "diffusers' HunyuanDiT2DModel"
POOL_HEADS = 8


@register("diffusers-hunyuan-dit", paper="Hunyuan-DiT, arXiv 2405.08748")
class DiffusersHunyuanDiT(Format):
    """v1.1 with sizes and style, v1.2 without."""

    family: ClassVar[str] = "hunyuan-dit"
    folder: ClassVar[bool] = True
    keymap: ClassVar[KeyMap] = KeyMap(
        Move("pos_embed.proj.{p}", "x_embedder.proj.{p}"),
        Move("text_embedder.linear_1.{p}", "t5_embedder.0.{p}"),
        Move("text_embedder.linear_2.{p}", "t5_embedder.2.{p}"),
        Move("text_embedding_padding", "padding"),
        Move(TIME + "timestep_embedder.linear_1.{p}", "t_embedder.mlp.0.{p}"),
        Move(TIME + "timestep_embedder.linear_2.{p}", "t_embedder.mlp.2.{p}"),
        Move(TIME + "pooler.positional_embedding", "conditions.pool.positions"),
        *(Move(TIME + f"pooler.{x}_proj.{{p}}", f"conditions.pool.{x}.{{p}}") for x in "qkv"),
        Move(TIME + "pooler.c_proj.{p}", "conditions.pool.proj.{p}"),
        Move(TIME + "style_embedder.weight", "conditions.style.weight"),
        Move(TIME + "extra_embedder.linear_1.{p}", "conditions.mlp.0.{p}"),
        Move(TIME + "extra_embedder.linear_2.{p}", "conditions.mlp.2.{p}"),
        Move(BLOCK + "norm1.norm.{p}", "blocks.{i}.norm1.{p}"),
        Move(BLOCK + "norm1.linear.{p}", "blocks.{i}.modulation.linear.{p}"),
        Fuse(tuple(BLOCK + f"attn1.to_{x}.{{p}}" for x in "qkv"), "blocks.{i}.attn.qkv.{p}"),
        Move(BLOCK + "attn1.to_out.0.{p}", "blocks.{i}.attn.proj.{p}"),
        *(Move(BLOCK + f"attn1.norm_{x}.{{p}}", f"blocks.{{i}}.attn.{x}_norm.{{p}}") for x in "qk"),
        Move(BLOCK + "norm2.{p}", "blocks.{i}.norm_cross.{p}"),
        Move(BLOCK + "attn2.to_q.{p}", "blocks.{i}.cross.q.{p}"),
        Fuse(tuple(BLOCK + f"attn2.to_{x}.{{p}}" for x in "kv"), "blocks.{i}.cross.kv.{p}"),
        Move(BLOCK + "attn2.to_out.0.{p}", "blocks.{i}.cross.proj.{p}"),
        *(Move(BLOCK + f"attn2.norm_{x}.{{p}}", f"blocks.{{i}}.cross.{x}_norm.{{p}}") for x in "qk"),
        Move(BLOCK + "norm3.{p}", "blocks.{i}.norm2.{p}"),
        Move(BLOCK + "ff.net.0.proj.{p}", "blocks.{i}.mlp.fc1.{p}"),
        Move(BLOCK + "ff.net.2.{p}", "blocks.{i}.mlp.fc2.{p}"),
        Move(BLOCK + "skip_norm.{p}", "blocks.{i}.merge.norm.{p}"),
        Move(BLOCK + "skip_linear.{p}", "blocks.{i}.merge.linear.{p}"),
        Move("norm_out.linear.{p}", "final_layer.modulation.linear.{p}", SWAP),
        Move("proj_out.{p}", "final_layer.linear.{p}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        tops = {key.partition(".")[0] for key in foreign.tensors}
        return {"time_extra_emb", "text_embedding_padding", "blocks"} <= tops

    def config(self, foreign: Foreign) -> HunyuanDiTConfig:
        given = foreign.settings
        width, channels, patch, _ = foreign.shape("pos_embed.proj.weight")
        t5_tokens, t5_width = foreign.shape(TIME + "pooler.positional_embedding")
        tokens, text_width = foreign.shape("text_embedding_padding")
        hidden = foreign.shape("blocks.0.ff.net.0.proj.weight")[0]
        return HunyuanDiTConfig(
            depth=foreign.count(r"blocks\.(\d+)\."),
            width=width,
            heads=width // foreign.shape("blocks.0.attn1.norm_q.weight")[0],
            patch=patch,
            image_size=given.get("sample_size", 128),
            channels=channels,
            text_width=text_width,
            text_tokens=tokens - t5_tokens + 1,
            t5_width=t5_width,
            t5_tokens=t5_tokens - 1,
            pooled=foreign.shape(TIME + "pooler.c_proj.weight")[0],
            pool_heads=POOL_HEADS,
            learn_sigma=foreign.shape("proj_out.weight")[0] == 2 * channels * patch**2,
            mlp_ratio=given.get("mlp_ratio", hidden / width),
            sized=TIME + "style_embedder.weight" in foreign.tensors,
        )

    def settings(self, config: HunyuanDiTConfig) -> dict[str, Any]:
        refuse_unless(config, CLASS, pool_heads=POOL_HEADS)
        return {
            "_class_name": "HunyuanDiT2DModel",
            "num_attention_heads": config.heads,
            "attention_head_dim": config.width // config.heads,
            "in_channels": config.channels,
            "patch_size": config.patch,
            "activation_fn": "gelu-approximate",
            "sample_size": config.image_size,
            "hidden_size": config.width,
            "num_layers": config.depth,
            "mlp_ratio": config.mlp_ratio,
            "learn_sigma": config.learn_sigma,
            "cross_attention_dim": config.text_width,
            "cross_attention_dim_t5": config.t5_width,
            "pooled_projection_dim": config.pooled,
            "text_len": config.text_tokens,
            "text_len_t5": config.t5_tokens,
            "use_style_cond_and_image_meta_size": config.sized,
        }
