"""State dicts of Tencent/HunyuanDiT; its norm3 stands before the cross-attention and norm2 before the feed-forward."""

from __future__ import annotations

from typing import ClassVar

from ditloom.backbones.hunyuan_dit import HunyuanDiTConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format
from ditloom.hub.keymap import KeyMap, Move

BLOCK = "blocks.{i}."
PUBLISHED_RATIO = 4.3637


@register("hunyuan-dit", paper="Hunyuan-DiT, arXiv 2405.08748")
class HunyuanDiTStateDict(Format):
    """pytorch_model_ema.pt and pytorch_model_module.pt of v1.1 and v1.2."""

    family: ClassVar[str] = "hunyuan-dit"
    keymap: ClassVar[KeyMap] = KeyMap(
        Move("mlp_t5.{rest}", "t5_embedder.{rest}"),
        Move("text_embedding_padding", "padding"),
        Move("pooler.positional_embedding", "conditions.pool.positions"),
        *(Move(f"pooler.{x}_proj.{{p}}", f"conditions.pool.{x}.{{p}}") for x in "qkv"),
        Move("pooler.c_proj.{p}", "conditions.pool.proj.{p}"),
        Move("style_embedder.weight", "conditions.style.weight"),
        Move("extra_embedder.{rest}", "conditions.mlp.{rest}"),
        Move(BLOCK + "default_modulation.1.{p}", BLOCK + "modulation.linear.{p}"),
        Move(BLOCK + "attn1.Wqkv.{p}", BLOCK + "attn.qkv.{p}"),
        Move(BLOCK + "attn1.out_proj.{p}", BLOCK + "attn.proj.{p}"),
        *(Move(BLOCK + f"attn1.{x}_norm.{{p}}", BLOCK + f"attn.{x}_norm.{{p}}") for x in "qk"),
        Move(BLOCK + "attn2.q_proj.{p}", BLOCK + "cross.q.{p}"),
        Move(BLOCK + "attn2.kv_proj.{p}", BLOCK + "cross.kv.{p}"),
        Move(BLOCK + "attn2.out_proj.{p}", BLOCK + "cross.proj.{p}"),
        *(Move(BLOCK + f"attn2.{x}_norm.{{p}}", BLOCK + f"cross.{x}_norm.{{p}}") for x in "qk"),
        Move(BLOCK + "norm3.{p}", BLOCK + "norm_cross.{p}"),
        Move(BLOCK + "skip_norm.{p}", BLOCK + "merge.norm.{p}"),
        Move(BLOCK + "skip_linear.{p}", BLOCK + "merge.linear.{p}"),
        Move("final_layer.adaLN_modulation.1.{p}", "final_layer.modulation.linear.{p}"),
        Move("{rest}", "{rest}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        needed = {"mlp_t5.0.weight", "text_embedding_padding", "blocks.0.default_modulation.1.weight"}
        return needed <= foreign.tensors.keys()

    def config(self, foreign: Foreign) -> HunyuanDiTConfig:
        width, channels, patch, _ = foreign.shape("x_embedder.proj.weight")
        t5_tokens, t5_width = foreign.shape("pooler.positional_embedding")
        tokens, text_width = foreign.shape("text_embedding_padding")
        hidden = foreign.shape("blocks.0.mlp.fc1.weight")[0]
        return HunyuanDiTConfig(
            depth=foreign.count(r"blocks\.(\d+)\."),
            width=width,
            heads=width // foreign.shape("blocks.0.attn1.q_norm.weight")[0],
            patch=patch,
            channels=channels,
            text_width=text_width,
            text_tokens=tokens - t5_tokens + 1,
            t5_width=t5_width,
            t5_tokens=t5_tokens - 1,
            pooled=foreign.shape("pooler.c_proj.weight")[0],
            learn_sigma=foreign.shape("final_layer.linear.weight")[0] == 2 * channels * patch**2,
            mlp_ratio=PUBLISHED_RATIO if int(width * PUBLISHED_RATIO) == hidden else hidden / width,
            sized="style_embedder.weight" in foreign.tensors,
        )
