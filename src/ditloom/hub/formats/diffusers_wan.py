"""diffusers' WanTransformer3DModel (Wan 2.1): a folder of config.json and weights."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from ditloom.backbones.wan import WanConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, refuse_unless
from ditloom.hub.keymap import TABLE, Fuse, KeyMap, Move

BLOCK = "blocks.{i}."
CLASS = "diffusers' WanTransformer3DModel"
HEAD = 128


@register("diffusers-wan", paper="Wan: Open and Advanced Large-Scale Video Generative Models, arXiv 2503.20314")
class DiffusersWan(Format):
    """Text to video, and images to video; not the model for a first and a last frame."""

    family: ClassVar[str] = "wan"
    folder: ClassVar[bool] = True
    keymap: ClassVar[KeyMap] = KeyMap(
        Move("condition_embedder.image_embedder.norm1.{p}", "image_embedder.norm_in.{p}"),
        Move("condition_embedder.image_embedder.ff.net.0.proj.{p}", "image_embedder.fc1.{p}"),
        Move("condition_embedder.image_embedder.ff.net.2.{p}", "image_embedder.fc2.{p}"),
        Move("condition_embedder.image_embedder.norm2.{p}", "image_embedder.norm_out.{p}"),
        Fuse(tuple(BLOCK + f"attn2.add_{x}_proj.{{p}}" for x in "kv"), "blocks.{i}.cross.kv_image.{p}"),
        Move(BLOCK + "attn2.norm_added_k.weight", "blocks.{i}.cross.k_norm_image.norm.weight"),
        Move("patch_embedding.{p}", "x_embedder.proj.{p}"),
        Move("condition_embedder.time_embedder.linear_1.{p}", "t_embedder.mlp.0.{p}"),
        Move("condition_embedder.time_embedder.linear_2.{p}", "t_embedder.mlp.2.{p}"),
        Move("condition_embedder.time_proj.{p}", "modulation.linear.{p}"),
        Move("condition_embedder.text_embedder.linear_1.{p}", "text_embedder.fc1.{p}"),
        Move("condition_embedder.text_embedder.linear_2.{p}", "text_embedder.fc2.{p}"),
        Move(BLOCK + "scale_shift_table", "blocks.{i}.modulation.table", TABLE),
        Fuse(tuple(BLOCK + f"attn1.to_{x}.{{p}}" for x in "qkv"), "blocks.{i}.attn.qkv.{p}"),
        Move(BLOCK + "attn1.to_out.0.{p}", "blocks.{i}.attn.proj.{p}"),
        *(Move(BLOCK + f"attn1.norm_{x}.weight", f"blocks.{{i}}.attn.{x}_norm.norm.weight") for x in "qk"),
        Move(BLOCK + "norm2.{p}", "blocks.{i}.norm_cross.{p}"),
        Move(BLOCK + "attn2.to_q.{p}", "blocks.{i}.cross.q.{p}"),
        Fuse(tuple(BLOCK + f"attn2.to_{x}.{{p}}" for x in "kv"), "blocks.{i}.cross.kv.{p}"),
        Move(BLOCK + "attn2.to_out.0.{p}", "blocks.{i}.cross.proj.{p}"),
        *(Move(BLOCK + f"attn2.norm_{x}.weight", f"blocks.{{i}}.cross.{x}_norm.norm.weight") for x in "qk"),
        Move(BLOCK + "ffn.net.0.proj.{p}", "blocks.{i}.mlp.fc1.{p}"),
        Move(BLOCK + "ffn.net.2.{p}", "blocks.{i}.mlp.fc2.{p}"),
        Move("scale_shift_table", "final_layer.modulation.table", TABLE),
        Move("proj_out.{p}", "final_layer.linear.{p}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        tops = {key.partition(".")[0] for key in foreign.tensors}
        return {"patch_embedding", "condition_embedder", "scale_shift_table", "blocks"} <= tops

    def config(self, foreign: Foreign) -> WanConfig:
        width, read, *patch = foreign.shape("patch_embedding.weight")
        channels = foreign.shape("proj_out.weight")[0] // math.prod(patch)
        image = "condition_embedder.image_embedder.ff.net.0.proj.weight"
        return WanConfig(
            depth=foreign.count(r"blocks\.(\d+)\."),
            width=width,
            heads=foreign.settings.get("num_attention_heads", width // HEAD),
            hidden=foreign.shape("blocks.0.ffn.net.0.proj.weight")[0],
            patch=(patch[0], patch[1], patch[2]),
            channels=channels,
            image_width=foreign.shape(image)[1] if image in foreign.tensors else 0,
            given=read - channels,
            text_width=foreign.shape("condition_embedder.text_embedder.linear_1.weight")[1],
        )

    def settings(self, config: WanConfig) -> dict[str, Any]:
        refuse_unless(config, CLASS, theta=10000.0)
        return {
            "_class_name": "WanTransformer3DModel",
            "patch_size": list(config.patch),
            "num_attention_heads": config.heads,
            "attention_head_dim": config.head_dim,
            "in_channels": config.channels + config.given,
            "out_channels": config.channels,
            "image_dim": config.image_width or None,
            "added_kv_proj_dim": config.width if config.image_width else None,
            "text_dim": config.text_width,
            "freq_dim": 256,
            "ffn_dim": config.hidden,
            "num_layers": config.depth,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": 1e-6,
        }
