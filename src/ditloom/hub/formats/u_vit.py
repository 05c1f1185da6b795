"""State dicts of baofff/U-ViT, class-conditional (libs/uvit.py) and text-conditional (libs/uvit_t2i.py)."""

from __future__ import annotations

from typing import Any, ClassVar

from ditloom.backbones import u_vit
from ditloom.backbones.u_vit import UViTConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, known_heads, refuse_unless, split_null, square_side
from ditloom.hub.keymap import KeyMap, Move

CLIP_TOKENS = 77


def _half(config: Any) -> int:
    return config.depth // 2


@register("u-vit", paper="All are Worth Words, arXiv 2209.12152")
class UViTStateDict(Format):
    """nnet_ema.pth of a training run, or a released checkpoint."""

    family: ClassVar[str] = "u-vit"
    keymap: ClassVar[KeyMap] = KeyMap(
        Move("in_blocks.{i}.{rest}", "blocks.{i}.{rest}", where=lambda c: range(_half(c))),
        Move("mid_block.{rest}", "blocks.{i}.{rest}", where=lambda c: range(_half(c), _half(c) + 1)),
        Move(
            "out_blocks.{i}.{rest}",
            "blocks.{i}.{rest}",
            where=lambda c: range(_half(c) + 1, c.depth + 1),
            from_zero=True,
        ),
        Move("patch_embed.{rest}", "x_embedder.{rest}"),
        Move("time_embed.{rest}", "t_embedder.{rest}"),
        Move("label_emb.weight", "y_embedder.embedding_table.weight"),
        Move("context_embed.{p}", "text_embedder.{p}"),
        Move("decoder_pred.{p}", "linear.{p}"),
        Move("{rest}", "{rest}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        tops = {key.partition(".")[0] for key in foreign.tensors}
        return {"in_blocks", "mid_block", "out_blocks", "decoder_pred"} <= tops

    def config(self, foreign: Foreign) -> UViTConfig:
        keys = foreign.tensors
        width, channels, patch, _ = foreign.shape("patch_embed.proj.weight")
        depth = 2 * foreign.count(r"in_blocks\.(\d+)\.")
        classes, null = split_null(foreign.shape("label_emb.weight")[0]) if "label_emb.weight" in keys else (0, True)
        text = foreign.shape("context_embed.weight")[1] if "context_embed.weight" in keys else 0
        image = foreign.shape("pos_embed")[1] - 1 - bool(classes) - (CLIP_TOKENS if text else 0)
        return UViTConfig(
            depth=depth,
            width=width,
            heads=known_heads(u_vit.PRESETS, depth, width, "U-ViT"),
            patch=patch,
            image_size=square_side(image, "pos_embed") * patch,
            channels=channels,
            classes=classes,
            null_class=null,
            text_width=text,
            mlp_ratio=foreign.shape("mid_block.mlp.fc1.weight")[0] / width,
            qkv_bias="mid_block.attn.qkv.bias" in keys,
            time_mlp="time_embed.0.weight" in keys,
            convolution="final_layer.weight" in keys,
        )

    def settings(self, config: Any) -> dict[str, Any]:
        refuse_unless(config, "u-vit", attention="softmax")
        return {}
