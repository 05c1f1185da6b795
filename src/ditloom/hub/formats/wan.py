"""State dicts of Wan-Video/Wan2.1, text to video and images to video."""

from __future__ import annotations

import math
from typing import ClassVar

from ditloom.backbones.wan import WanConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format
from ditloom.hub.keymap import TABLE, Fuse, KeyMap, Move

BLOCK = "blocks.{i}."
HEAD = 128


@register("wan", paper="Wan: Open and Advanced Large-Scale Video Generative Models, arXiv 2503.20314")
class WanStateDict(Format):
    """diffusion_pytorch_model.safetensors of the official repositories. Heads have 128 features in all releases."""

    family: ClassVar[str] = "wan"
    keymap: ClassVar[KeyMap] = KeyMap(
        Move("img_emb.proj.0.{p}", "image_embedder.norm_in.{p}"),
        Move("img_emb.proj.1.{p}", "image_embedder.fc1.{p}"),
        Move("img_emb.proj.3.{p}", "image_embedder.fc2.{p}"),
        Move("img_emb.proj.4.{p}", "image_embedder.norm_out.{p}"),
        Fuse(tuple(BLOCK + f"cross_attn.{x}_img.{{p}}" for x in "kv"), BLOCK + "cross.kv_image.{p}"),
        Move(BLOCK + "cross_attn.norm_k_img.weight", BLOCK + "cross.k_norm_image.norm.weight"),
        Move("patch_embedding.{p}", "x_embedder.proj.{p}"),
        Move("time_embedding.{rest}", "t_embedder.mlp.{rest}"),
        Move("time_projection.1.{p}", "modulation.linear.{p}"),
        Move("text_embedding.0.{p}", "text_embedder.fc1.{p}"),
        Move("text_embedding.2.{p}", "text_embedder.fc2.{p}"),
        Move(BLOCK + "modulation", BLOCK + "modulation.table", TABLE),
        Fuse(tuple(BLOCK + f"self_attn.{x}.{{p}}" for x in "qkv"), BLOCK + "attn.qkv.{p}"),
        Move(BLOCK + "self_attn.o.{p}", BLOCK + "attn.proj.{p}"),
        *(Move(BLOCK + f"self_attn.norm_{x}.weight", BLOCK + f"attn.{x}_norm.norm.weight") for x in "qk"),
        Move(BLOCK + "norm3.{p}", BLOCK + "norm_cross.{p}"),
        Move(BLOCK + "cross_attn.q.{p}", BLOCK + "cross.q.{p}"),
        Fuse(tuple(BLOCK + f"cross_attn.{x}.{{p}}" for x in "kv"), BLOCK + "cross.kv.{p}"),
        Move(BLOCK + "cross_attn.o.{p}", BLOCK + "cross.proj.{p}"),
        *(Move(BLOCK + f"cross_attn.norm_{x}.weight", BLOCK + f"cross.{x}_norm.norm.weight") for x in "qk"),
        Move(BLOCK + "ffn.0.{p}", BLOCK + "mlp.fc1.{p}"),
        Move(BLOCK + "ffn.2.{p}", BLOCK + "mlp.fc2.{p}"),
        Move("head.modulation", "final_layer.modulation.table", TABLE),
        Move("head.head.{p}", "final_layer.linear.{p}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        needed = {"patch_embedding.weight", "time_projection.1.weight", "head.modulation", "blocks.0.modulation"}
        return needed <= foreign.tensors.keys()

    def config(self, foreign: Foreign) -> WanConfig:
        width, read, *patch = foreign.shape("patch_embedding.weight")
        channels = foreign.shape("head.head.weight")[0] // math.prod(patch)
        image = "img_emb.proj.1.weight"
        return WanConfig(
            depth=foreign.count(r"blocks\.(\d+)\."),
            width=width,
            heads=width // HEAD,
            hidden=foreign.shape("blocks.0.ffn.0.weight")[0],
            patch=(patch[0], patch[1], patch[2]),
            channels=channels,
            image_width=foreign.shape(image)[1] if image in foreign.tensors else 0,
            given=read - channels,
            text_width=foreign.shape("text_embedding.0.weight")[1],
        )
