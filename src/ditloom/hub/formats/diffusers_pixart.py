"""diffusers' PixArtTransformer2DModel (PixArt-alpha and PixArt-Sigma): a folder of config.json and weights."""

from __future__ import annotations

from typing import Any, ClassVar

from ditloom.backbones.pixart_sigma import PixArtConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, refuse_unless
from ditloom.hub.keymap import Fuse, KeyMap, Move

BLOCK = "transformer_blocks.{i}."
CLASS = "diffusers' PixArtTransformer2DModel"
TIME = "adaln_single.emb."


def _mlp(theirs: str, ours: str) -> tuple[Move, Move]:
    """Their (linear_1, linear_2) are our (mlp.0, mlp.2)."""
    return Move(f"{theirs}.linear_1.{{p}}", f"{ours}.mlp.0.{{p}}"), Move(
        f"{theirs}.linear_2.{{p}}", f"{ours}.mlp.2.{{p}}"
    )


@register("diffusers-pixart", paper="PixArt-Sigma, arXiv 2403.04692; PixArt-alpha, arXiv 2310.00426")
class DiffusersPixArt(Format):
    """Without compressed keys, norms of queries and keys, or a stored null caption: that port has none."""

    family: ClassVar[str] = "pixart-sigma"
    folder: ClassVar[bool] = True
    keymap: ClassVar[KeyMap] = KeyMap(
        Move("pos_embed.proj.{p}", "x_embedder.proj.{p}"),
        *_mlp(TIME + "timestep_embedder", "t_embedder"),
        *_mlp(TIME + "resolution_embedder", "size_embedder.size"),
        *_mlp(TIME + "aspect_ratio_embedder", "size_embedder.aspect"),
        Move("adaln_single.linear.{p}", "modulation.linear.{p}"),
        Move("caption_projection.linear_1.{p}", "text_embedder.fc1.{p}"),
        Move("caption_projection.linear_2.{p}", "text_embedder.fc2.{p}"),
        Move(BLOCK + "scale_shift_table", "blocks.{i}.modulation.table"),
        Fuse(tuple(BLOCK + f"attn1.to_{x}.{{p}}" for x in "qkv"), "blocks.{i}.attn.qkv.{p}"),
        Move(BLOCK + "attn1.to_out.0.{p}", "blocks.{i}.attn.proj.{p}"),
        Move(BLOCK + "attn2.to_q.{p}", "blocks.{i}.cross.q.{p}"),
        Fuse(tuple(BLOCK + f"attn2.to_{x}.{{p}}" for x in "kv"), "blocks.{i}.cross.kv.{p}"),
        Move(BLOCK + "attn2.to_out.0.{p}", "blocks.{i}.cross.proj.{p}"),
        Move(BLOCK + "ff.net.0.proj.{p}", "blocks.{i}.mlp.fc1.{p}"),
        Move(BLOCK + "ff.net.2.{p}", "blocks.{i}.mlp.fc2.{p}"),
        Move("scale_shift_table", "final_layer.modulation.table"),
        Move("proj_out.{p}", "final_layer.linear.{p}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        tops = {key.partition(".")[0] for key in foreign.tensors}
        needed = {"transformer_blocks", "adaln_single", "caption_projection", "pos_embed", "scale_shift_table"}
        return needed <= tops and "temporal_transformer_blocks" not in tops

    def config(self, foreign: Foreign) -> PixArtConfig:
        given = foreign.settings
        width, channels, patch, _ = foreign.shape("pos_embed.proj.weight")
        size = given.get("sample_size", 128)
        return PixArtConfig(
            depth=foreign.count(r"transformer_blocks\.(\d+)\."),
            width=width,
            heads=given.get("num_attention_heads", 16),
            patch=patch,
            image_size=size,
            channels=channels,
            text_width=foreign.shape("caption_projection.linear_1.weight")[1],
            learn_sigma=foreign.shape("proj_out.weight")[0] == 2 * channels * patch**2,
            mlp_ratio=foreign.shape("transformer_blocks.0.ff.net.0.proj.weight")[0] / width,
            interpolation=float(given.get("interpolation_scale") or max(size // 64, 1)),
            sized=f"{TIME}resolution_embedder.linear_1.weight" in foreign.tensors,
        )

    def settings(self, config: PixArtConfig) -> dict[str, Any]:
        refuse_unless(config, CLASS, mlp_ratio=4.0, compressed=(), qk_norm=None, null_tokens=0)
        return {
            "_class_name": "PixArtTransformer2DModel",
            "num_attention_heads": config.heads,
            "attention_head_dim": config.width // config.heads,
            "in_channels": config.channels,
            "out_channels": config.out_channels,
            "num_layers": config.depth,
            "cross_attention_dim": config.width,
            "attention_bias": True,
            "sample_size": config.image_size,
            "patch_size": config.patch,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "interpolation_scale": config.interpolation,
            "use_additional_conditions": config.sized,
            "caption_channels": config.text_width,
        }
