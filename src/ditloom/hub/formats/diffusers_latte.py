"""diffusers' LatteTransformer3DModel (Latte-1, text to video): a folder of config.json and weights.

It keeps blocks within frames and blocks along time in two lists; ours are one, in the order in which they run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ditloom.backbones.latte import LatteConfig
from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, refuse_unless
from ditloom.hub.keymap import FRAME, KeyMap, Move, Placed, PlacedFuse

CLASS = "diffusers' LatteTransformer3DModel"
SPATIAL, TEMPORAL = "transformer_blocks", "temporal_transformer_blocks"


def _places(config: Any) -> Mapping[int, Mapping[str, Any]]:
    """Our flat position to their list and number; position 1 holds the positions of frames."""
    flat = [0, *range(2, config.depth + 1)]
    return {position: {"of": (SPATIAL, TEMPORAL)[n % 2], "n": n // 2} for n, position in enumerate(flat)}


def _move(theirs: str, ours: str) -> Placed:
    return Placed(f"{{of}}.{{n}}.{theirs}", f"blocks.{{i}}.{ours}", places=_places)


def _fuse(theirs: str, letters: str, ours: str) -> PlacedFuse:
    names = tuple(f"{{of}}.{{n}}.{theirs}.to_{x}.{{p}}" for x in letters)
    return PlacedFuse(names, f"blocks.{{i}}.{ours}", places=_places)


@register("diffusers-latte", paper="Latte: Latent Diffusion Transformer for Video Generation, arXiv 2401.03048")
class DiffusersLatte(Format):
    """Text-conditional only."""

    family: ClassVar[str] = "latte"
    folder: ClassVar[bool] = True
    keymap: ClassVar[KeyMap] = KeyMap(
        Move("pos_embed.proj.{p}", "x_embedder.proj.{p}", FRAME),
        Move("adaln_single.emb.timestep_embedder.linear_1.{p}", "t_embedder.mlp.0.{p}"),
        Move("adaln_single.emb.timestep_embedder.linear_2.{p}", "t_embedder.mlp.2.{p}"),
        Move("adaln_single.linear.{p}", "modulation.linear.{p}"),
        Move("caption_projection.linear_1.{p}", "text_embedder.fc1.{p}"),
        Move("caption_projection.linear_2.{p}", "text_embedder.fc2.{p}"),
        _move("scale_shift_table", "modulation.table"),
        _fuse("attn1", "qkv", "attn.qkv.{p}"),
        _move("attn1.to_out.0.{p}", "attn.proj.{p}"),
        _move("attn2.to_q.{p}", "cross.q.{p}"),
        _fuse("attn2", "kv", "cross.kv.{p}"),
        _move("attn2.to_out.0.{p}", "cross.proj.{p}"),
        _move("ff.net.0.proj.{p}", "mlp.fc1.{p}"),
        _move("ff.net.2.{p}", "mlp.fc2.{p}"),
        Move("scale_shift_table", "final_layer.modulation.table"),
        Move("proj_out.{p}", "final_layer.linear.{p}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        tops = {key.partition(".")[0] for key in foreign.tensors}
        return {SPATIAL, TEMPORAL, "adaln_single", "caption_projection"} <= tops

    def config(self, foreign: Foreign) -> LatteConfig:
        given = foreign.settings
        width, channels, patch, _ = foreign.shape("pos_embed.proj.weight")
        size = given.get("sample_size", 64)
        heads = given.get("num_attention_heads", 16)
        return LatteConfig(
            depth=2 * foreign.count(r"transformer_blocks\.(\d+)\."),
            width=width,
            heads=heads,
            patch=patch,
            image_size=size,
            frames=given.get("video_length", 16),
            channels=channels,
            text_width=foreign.shape("caption_projection.linear_1.weight")[1],
            learn_sigma=foreign.shape("proj_out.weight")[0] == 2 * channels * patch**2,
            mlp_ratio=foreign.shape("transformer_blocks.0.ff.net.0.proj.weight")[0] / width,
            interpolation=float(max(size // 64, 1)),
        )

    def settings(self, config: LatteConfig) -> dict[str, Any]:
        if not config.text_width:
            raise UserError(f"{CLASS} is conditional on text; this Latte is not")
        refuse_unless(config, CLASS, mlp_ratio=4.0, interpolation=float(max(config.image_size // 64, 1)))
        return {
            "_class_name": "LatteTransformer3DModel",
            "num_attention_heads": config.heads,
            "attention_head_dim": config.width // config.heads,
            "in_channels": config.channels,
            "out_channels": config.out_channels,
            "num_layers": config.depth // 2,
            "cross_attention_dim": config.width,
            "attention_bias": True,
            "sample_size": config.image_size,
            "patch_size": config.patch,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": config.text_width,
            "video_length": config.frames,
        }
