"""State dicts of NVlabs/Sana (sana_multi_scale.py), with the null caption."""

from __future__ import annotations

from typing import ClassVar

from ditloom.backbones.sana import SanaConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format
from ditloom.hub.formats.diffusers_sana import LINEAR_HEAD, known_cross_heads
from ditloom.hub.keymap import POINTWISE, KeyMap, Move

BLOCK = "blocks.{i}."


@register("sana", paper="SANA, arXiv 2410.10629; SANA 1.5, arXiv 2501.18427")
class SanaStateDict(Format):
    """Sana_1600M_1024px.pth and its like: "state_dict" of a release."""

    family: ClassVar[str] = "sana"
    unused: ClassVar[tuple[str, ...]] = ("pos_embed",)
    keymap: ClassVar[KeyMap] = KeyMap(
        Move("t_block.1.{p}", "modulation.linear.{p}"),
        Move("y_embedder.y_proj.{rest}", "text_embedder.{rest}"),
        Move("y_embedder.y_embedding", "null_text"),
        Move("attention_y_norm.weight", "text_norm.weight"),
        Move(BLOCK + "scale_shift_table", BLOCK + "modulation.table"),
        *(Move(BLOCK + f"attn.{x}_norm.weight", BLOCK + f"attn.{x}_norm.norm.weight") for x in "qk"),
        *(Move(BLOCK + f"cross_attn.{x}_norm.weight", BLOCK + f"cross.{x}_norm.norm.weight") for x in "qk"),
        Move(BLOCK + "cross_attn.q_linear.{p}", BLOCK + "cross.q.{p}"),
        Move(BLOCK + "cross_attn.kv_linear.{p}", BLOCK + "cross.kv.{p}"),
        Move(BLOCK + "cross_attn.proj.{p}", BLOCK + "cross.proj.{p}"),
        Move(BLOCK + "mlp.inverted_conv.conv.{p}", BLOCK + "mlp.fc1.{p}", POINTWISE),
        Move(BLOCK + "mlp.depth_conv.conv.{p}", BLOCK + "mlp.conv.{p}"),
        Move(BLOCK + "mlp.point_conv.conv.{p}", BLOCK + "mlp.fc2.{p}", POINTWISE),
        Move("final_layer.scale_shift_table", "final_layer.modulation.table"),
        Move("{rest}", "{rest}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        return {"attention_y_norm.weight", "blocks.0.mlp.inverted_conv.conv.weight"} <= foreign.tensors.keys()

    def config(self, foreign: Foreign) -> SanaConfig:
        keys = foreign.tensors
        width, channels, patch, _ = foreign.shape("x_embedder.proj.weight")
        depth = foreign.count(r"blocks\.(\d+)\.")
        null = foreign.shape("y_embedder.y_embedding")[0] if "y_embedder.y_embedding" in keys else 0
        return SanaConfig(
            depth=depth,
            width=width,
            heads=width // LINEAR_HEAD,
            cross_heads=known_cross_heads(depth, width),
            patch=patch,
            channels=channels,
            text_width=foreign.shape("y_embedder.y_proj.fc1.weight")[1],
            text_tokens=null or SanaConfig.text_tokens,
            mlp_ratio=foreign.shape("blocks.0.mlp.point_conv.conv.weight")[1] / width,
            qk_norm="blocks.0.attn.q_norm.weight" in keys,
            null_tokens=null,
        )
