"""diffusers' DiTTransformer2DModel: a folder of config.json and diffusion_pytorch_model.safetensors.

That port spaces the frequencies of the time embedding by (half - 1) where facebookresearch/DiT has half, and its second
norm has eps 1e-5 unless told otherwise. A model loaded from it keeps both, so that it computes what diffusers computes.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from ditloom.backbones import dit
from ditloom.backbones.dit import DiTConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, known_heads, refuse_unless
from ditloom.hub.keymap import Copies, Fuse, KeyMap, Move

BLOCK = "transformer_blocks.{i}."
EMBEDDERS = BLOCK + "norm1.emb."


@register("diffusers-dit", paper="Scalable Diffusion Models with Transformers, arXiv 2212.09748")
class DiffusersDiT(Format):
    """Class-conditional only; the embedders, which it keeps in every block, must be equal."""

    family: ClassVar[str] = "dit"
    folder: ClassVar[bool] = True
    keymap: ClassVar[KeyMap] = KeyMap(
        Move("pos_embed.proj.{p}", "x_embedder.proj.{p}"),
        Copies(EMBEDDERS + "timestep_embedder.linear_1.{p}", "t_embedder.mlp.0.{p}"),
        Copies(EMBEDDERS + "timestep_embedder.linear_2.{p}", "t_embedder.mlp.2.{p}"),
        Copies(EMBEDDERS + "class_embedder.embedding_table.weight", "y_embedder.embedding_table.weight"),
        Move(BLOCK + "norm1.linear.{p}", "blocks.{i}.modulation.linear.{p}"),
        Fuse(tuple(BLOCK + f"attn1.to_{x}.{{p}}" for x in "qkv"), "blocks.{i}.attn.qkv.{p}"),
        Move(BLOCK + "attn1.to_out.0.{p}", "blocks.{i}.attn.proj.{p}"),
        Move(BLOCK + "ff.net.0.proj.{p}", "blocks.{i}.mlp.fc1.{p}"),
        Move(BLOCK + "ff.net.2.{p}", "blocks.{i}.mlp.fc2.{p}"),
        Move("proj_out_1.{p}", "final_layer.modulation.linear.{p}"),
        Move("proj_out_2.{p}", "final_layer.linear.{p}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        tops = {key.partition(".")[0] for key in foreign.tensors}
        return {"transformer_blocks", "proj_out_1", "proj_out_2"} <= tops

    def config(self, foreign: Foreign) -> DiTConfig:
        given = foreign.settings
        width, channels, patch, _ = foreign.shape("pos_embed.proj.weight")
        depth = foreign.count(r"transformer_blocks\.(\d+)\.")
        rows = foreign.shape("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight")[0]
        return DiTConfig(
            depth=depth,
            width=width,
            heads=given.get("num_attention_heads") or known_heads(dit.PRESETS, depth, width, "DiT"),
            patch=patch,
            image_size=given.get("sample_size", 32),
            channels=channels,
            classes=rows - 1,
            learn_sigma=foreign.shape("proj_out_2.weight")[0] == 2 * channels * patch**2,
            mlp_ratio=foreign.shape("transformer_blocks.0.ff.net.0.proj.weight")[0] / width,
            frequency_shift=1,
            norm2_eps=given.get("norm_eps", 1e-5),
        )

    def settings(self, config: DiTConfig) -> dict[str, Any]:
        refuse_unless(config, "diffusers' DiTTransformer2DModel", null_class=True, mlp_ratio=4.0, attention="softmax")
        if config.frequency_shift != 1:
            warnings.warn(
                "diffusers' DiT spaces its time frequencies differently (by half - 1): it will not compute exactly "
                "what this model computes",
                stacklevel=4,
            )
        return {
            "_class_name": "DiTTransformer2DModel",
            "num_attention_heads": config.heads,
            "attention_head_dim": config.width // config.heads,
            "in_channels": config.channels,
            "out_channels": config.out_channels,
            "num_layers": config.depth,
            "sample_size": config.image_size,
            "patch_size": config.patch,
            "num_embeds_ada_norm": config.classes,
            "norm_eps": config.norm2_eps,
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
        }
