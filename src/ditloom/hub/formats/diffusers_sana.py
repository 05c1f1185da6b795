"""diffusers' SanaTransformer2DModel (SANA and SANA 1.5): a folder of config.json and weights."""

from __future__ import annotations

from typing import Any, ClassVar

from ditloom.backbones.sana import PRESETS, SanaConfig
from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, known_heads, refuse_unless
from ditloom.hub.keymap import POINTWISE, Fuse, KeyMap, Move

BLOCK, OURS = "transformer_blocks.{i}.", "blocks.{i}."
CLASS = "diffusers' SanaTransformer2DModel"
TIME = "time_embed.emb.timestep_embedder."
LINEAR_HEAD = 32


@register("diffusers-sana", paper="SANA, arXiv 2410.10629; SANA 1.5, arXiv 2501.18427")
class DiffusersSana(Format):
    """Without a stored null caption: that port has none. The form for 4K, with positions, and Sprint are refused."""

    family: ClassVar[str] = "sana"
    folder: ClassVar[bool] = True
    keymap: ClassVar[KeyMap] = KeyMap(
        Move("patch_embed.proj.{p}", "x_embedder.proj.{p}"),
        Move(TIME + "linear_1.{p}", "t_embedder.mlp.0.{p}"),
        Move(TIME + "linear_2.{p}", "t_embedder.mlp.2.{p}"),
        Move("time_embed.linear.{p}", "modulation.linear.{p}"),
        Move("caption_projection.linear_1.{p}", "text_embedder.fc1.{p}"),
        Move("caption_projection.linear_2.{p}", "text_embedder.fc2.{p}"),
        Move("caption_norm.weight", "text_norm.weight"),
        Move(BLOCK + "scale_shift_table", OURS + "modulation.table"),
        Fuse(tuple(BLOCK + f"attn1.to_{x}.weight" for x in "qkv"), OURS + "attn.qkv.weight"),
        Move(BLOCK + "attn1.to_out.0.{p}", OURS + "attn.proj.{p}"),
        Move(BLOCK + "attn2.to_q.{p}", OURS + "cross.q.{p}"),
        Fuse(tuple(BLOCK + f"attn2.to_{x}.{{p}}" for x in "kv"), OURS + "cross.kv.{p}"),
        Move(BLOCK + "attn2.to_out.0.{p}", OURS + "cross.proj.{p}"),
        *(Move(BLOCK + f"attn1.norm_{x}.weight", OURS + f"attn.{x}_norm.norm.weight") for x in "qk"),
        *(Move(BLOCK + f"attn2.norm_{x}.weight", OURS + f"cross.{x}_norm.norm.weight") for x in "qk"),
        Move(BLOCK + "ff.conv_inverted.{p}", OURS + "mlp.fc1.{p}", POINTWISE),
        Move(BLOCK + "ff.conv_depth.{p}", OURS + "mlp.conv.{p}"),
        Move(BLOCK + "ff.conv_point.{p}", OURS + "mlp.fc2.{p}", POINTWISE),
        Move("scale_shift_table", "final_layer.modulation.table"),
        Move("proj_out.{p}", "final_layer.linear.{p}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        needed = {"caption_norm.weight", "time_embed.linear.weight", "transformer_blocks.0.ff.conv_inverted.weight"}
        return needed <= foreign.tensors.keys()

    def config(self, foreign: Foreign) -> SanaConfig:
        given = foreign.settings
        if given.get("interpolation_scale") is not None or given.get("guidance_embeds"):
            raise UserError(
                f"{foreign.name} is a SANA with positions (4K) or guidance (Sprint), which is not supported"
            )
        width, channels, patch, _ = foreign.shape("patch_embed.proj.weight")
        depth = foreign.count(r"transformer_blocks\.(\d+)\.")
        return SanaConfig(
            depth=depth,
            width=width,
            heads=given.get("num_attention_heads", width // LINEAR_HEAD),
            cross_heads=given.get("num_cross_attention_heads") or known_cross_heads(depth, width),
            patch=patch,
            image_size=given.get("sample_size", 32),
            channels=channels,
            text_width=foreign.shape("caption_projection.linear_1.weight")[1],
            mlp_ratio=foreign.shape("transformer_blocks.0.ff.conv_point.weight")[1] / width,
            qk_norm="transformer_blocks.0.attn1.norm_q.weight" in foreign.tensors,
        )

    def settings(self, config: SanaConfig) -> dict[str, Any]:
        refuse_unless(config, CLASS, null_tokens=0)
        return {
            "_class_name": "SanaTransformer2DModel",
            "in_channels": config.channels,
            "out_channels": config.channels,
            "num_attention_heads": config.heads,
            "attention_head_dim": config.width // config.heads,
            "num_layers": config.depth,
            "num_cross_attention_heads": config.cross_heads,
            "cross_attention_head_dim": config.width // config.cross_heads,
            "cross_attention_dim": config.width,
            "caption_channels": config.text_width,
            "mlp_ratio": config.mlp_ratio,
            "attention_bias": False,
            "sample_size": config.image_size,
            "patch_size": config.patch,
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "interpolation_scale": None,
            "qk_norm": "rms_norm_across_heads" if config.qk_norm else None,
        }


def known_cross_heads(depth: int, width: int) -> int:
    """Heads of the cross-attention, which no tensor shows: from the published sizes."""
    known_heads(PRESETS, depth, width, "SANA")
    return next(c.cross_heads for c in PRESETS.values() if (c.depth, c.width) == (depth, width))
