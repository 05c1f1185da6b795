"""diffusers' FluxTransformer2DModel (FLUX.1): a folder of config.json and weights.

Its last norm stores (scale, shift) where ours stores (shift, scale), and its single blocks project the concatenated
branches with one matrix, of which each of our branches has its own columns.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ditloom.backbones.flux import FluxConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, refuse_unless
from ditloom.hub.keymap import LINEAR, SWAP, Fuse, KeyMap, Move, Part

CLASS = "diffusers' FluxTransformer2DModel"
BLOCK = "transformer_blocks.{i}."
ONE = "single_transformer_blocks.{i}."
EMBED = "time_text_embed."
GUIDANCE = 3.5


def singles(config: Any) -> range:
    """Where the single blocks stand: after the double ones and the transition."""
    return range(config.depth + 1, config.depth + 1 + config.single_depth)


OF_SINGLES: dict[str, Any] = {"where": singles, "from_zero": True}


@register("diffusers-flux", paper="FLUX.1, Black Forest Labs, 2024")
class DiffusersFlux(Format):
    """FLUX.1-dev and FLUX.1-schnell, and any FLUX of ours."""

    family: ClassVar[str] = "flux"
    folder: ClassVar[bool] = True
    keymap: ClassVar[KeyMap] = KeyMap(
        Move("x_embedder.{p}", "x_embedder.proj.{p}", LINEAR),
        Move("context_embedder.{p}", "text_embedder.{p}"),
        *(
            Move(f"{EMBED}{theirs}_embedder.linear_{n + 1}.{{p}}", f"{ours}_embedder.mlp.{2 * n}.{{p}}")
            for theirs, ours in (("timestep", "t"), ("text", "pooled"), ("guidance", "guidance"))
            for n in range(2)
        ),
        Fuse(tuple(ONE + f"attn.to_{x}.{{p}}" for x in "qkv"), "blocks.{i}.attn.qkv.{p}", **OF_SINGLES),
        *(Move(ONE + f"attn.norm_{x}.weight", f"blocks.{{i}}.attn.{x}_norm.weight", **OF_SINGLES) for x in "qk"),
        Move(ONE + "norm.linear.{p}", "blocks.{i}.modulation.linear.{p}", **OF_SINGLES),
        Move(ONE + "proj_mlp.{p}", "blocks.{i}.mlp.fc1.{p}", **OF_SINGLES),
        Part(ONE + "proj_out.weight", "blocks.{i}.attn.proj.weight", axis=1, **OF_SINGLES),
        Part(ONE + "proj_out.weight", "blocks.{i}.mlp.fc2.weight", axis=1, last=True, **OF_SINGLES),
        Move(ONE + "proj_out.bias", "blocks.{i}.attn.proj.bias", **OF_SINGLES),
        Move(BLOCK + "norm1.linear.{p}", "blocks.{i}.image.modulation.linear.{p}"),
        Move(BLOCK + "norm1_context.linear.{p}", "blocks.{i}.text.modulation.linear.{p}"),
        Fuse(tuple(BLOCK + f"attn.to_{x}.{{p}}" for x in "qkv"), "blocks.{i}.image.attn.qkv.{p}"),
        Fuse(tuple(BLOCK + f"attn.add_{x}_proj.{{p}}" for x in "qkv"), "blocks.{i}.text.attn.qkv.{p}"),
        Move(BLOCK + "attn.to_out.0.{p}", "blocks.{i}.image.attn.proj.{p}"),
        Move(BLOCK + "attn.to_add_out.{p}", "blocks.{i}.text.attn.proj.{p}"),
        *(Move(BLOCK + f"attn.norm_{x}.weight", f"blocks.{{i}}.image.attn.{x}_norm.weight") for x in "qk"),
        *(Move(BLOCK + f"attn.norm_added_{x}.weight", f"blocks.{{i}}.text.attn.{x}_norm.weight") for x in "qk"),
        Move(BLOCK + "ff.net.0.proj.{p}", "blocks.{i}.image.mlp.fc1.{p}"),
        Move(BLOCK + "ff.net.2.{p}", "blocks.{i}.image.mlp.fc2.{p}"),
        Move(BLOCK + "ff_context.net.0.proj.{p}", "blocks.{i}.text.mlp.fc1.{p}"),
        Move(BLOCK + "ff_context.net.2.{p}", "blocks.{i}.text.mlp.fc2.{p}"),
        Move("norm_out.linear.{p}", "final_layer.modulation.linear.{p}", SWAP),
        Move("proj_out.{p}", "final_layer.linear.{p}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        tops = {key.partition(".")[0] for key in foreign.tensors}
        return {"single_transformer_blocks", "time_text_embed", "context_embedder"} <= tops

    def config(self, foreign: Foreign) -> FluxConfig:
        given = foreign.settings
        width, packed = foreign.shape("x_embedder.weight")
        guided = "time_text_embed.guidance_embedder.linear_1.weight" in foreign.tensors
        return FluxConfig(
            depth=foreign.count(r"transformer_blocks\.(\d+)\."),
            single_depth=foreign.count(r"single_transformer_blocks\.(\d+)\."),
            width=width,
            heads=width // foreign.shape("transformer_blocks.0.attn.norm_q.weight")[0],
            channels=packed // 4,
            text_width=foreign.shape("context_embedder.weight")[1],
            pooled_width=foreign.shape("time_text_embed.text_embedder.linear_1.weight")[1],
            guidance=GUIDANCE if guided else None,
            axes=tuple(given.get("axes_dims_rope", FluxConfig.axes)),
        )

    def settings(self, config: FluxConfig) -> dict[str, Any]:
        refuse_unless(config, CLASS, mlp_ratio=4.0, theta=10000.0, patch=2)
        return {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "in_channels": config.channels * config.patch**2,
            "num_layers": config.depth,
            "num_single_layers": config.single_depth,
            "attention_head_dim": config.width // config.heads,
            "num_attention_heads": config.heads,
            "joint_attention_dim": config.text_width,
            "pooled_projection_dim": config.pooled_width,
            "guidance_embeds": config.guidance is not None,
            "axes_dims_rope": list(config.axes),
        }
