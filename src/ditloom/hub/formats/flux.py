"""State dicts of black-forest-labs/flux: flux1-dev.safetensors and flux1-schnell.safetensors.

A single block's `linear1` holds queries, keys, values and the feed-forward's first layer one above the other, and its
`linear2` the output projections of both branches side by side.
"""

from __future__ import annotations

from typing import ClassVar

from ditloom.backbones.flux import PRESETS, FluxConfig
from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format
from ditloom.hub.formats.diffusers_flux import GUIDANCE, OF_SINGLES
from ditloom.hub.keymap import LINEAR, KeyMap, Move, Part

BLOCK = "double_blocks.{i}."
ONE = "single_blocks.{i}."
SIDES = (("img", "image"), ("txt", "text"))
AXES = PRESETS["FLUX.1-dev"].axes


@register("flux", paper="FLUX.1, Black Forest Labs, 2024")
class FluxStateDict(Format):
    """One file of weights; the rotary axes, which no tensor shows, are the published ones."""

    family: ClassVar[str] = "flux"
    keymap: ClassVar[KeyMap] = KeyMap(
        Move("img_in.{p}", "x_embedder.proj.{p}", LINEAR),
        Move("txt_in.{p}", "text_embedder.{p}"),
        *(
            Move(f"{theirs}_in.{layer}_layer.{{p}}", f"{ours}_embedder.mlp.{n}.{{p}}")
            for theirs, ours in (("time", "t"), ("vector", "pooled"), ("guidance", "guidance"))
            for layer, n in (("in", 0), ("out", 2))
        ),
        Part(ONE + "linear1.{p}", "blocks.{i}.attn.qkv.{p}", **OF_SINGLES),
        Part(ONE + "linear1.{p}", "blocks.{i}.mlp.fc1.{p}", last=True, **OF_SINGLES),
        Part(ONE + "linear2.weight", "blocks.{i}.attn.proj.weight", axis=1, **OF_SINGLES),
        Part(ONE + "linear2.weight", "blocks.{i}.mlp.fc2.weight", axis=1, last=True, **OF_SINGLES),
        Move(ONE + "linear2.bias", "blocks.{i}.attn.proj.bias", **OF_SINGLES),
        Move(ONE + "norm.query_norm.scale", "blocks.{i}.attn.q_norm.weight", **OF_SINGLES),
        Move(ONE + "norm.key_norm.scale", "blocks.{i}.attn.k_norm.weight", **OF_SINGLES),
        Move(ONE + "modulation.lin.{p}", "blocks.{i}.modulation.linear.{p}", **OF_SINGLES),
        *(
            entry
            for theirs, ours in SIDES
            for entry in (
                Move(BLOCK + theirs + "_mod.lin.{p}", "blocks.{i}." + ours + ".modulation.linear.{p}"),
                Move(BLOCK + theirs + "_attn.qkv.{p}", "blocks.{i}." + ours + ".attn.qkv.{p}"),
                Move(BLOCK + theirs + "_attn.norm.query_norm.scale", "blocks.{i}." + ours + ".attn.q_norm.weight"),
                Move(BLOCK + theirs + "_attn.norm.key_norm.scale", "blocks.{i}." + ours + ".attn.k_norm.weight"),
                Move(BLOCK + theirs + "_attn.proj.{p}", "blocks.{i}." + ours + ".attn.proj.{p}"),
                Move(BLOCK + theirs + "_mlp.0.{p}", "blocks.{i}." + ours + ".mlp.fc1.{p}"),
                Move(BLOCK + theirs + "_mlp.2.{p}", "blocks.{i}." + ours + ".mlp.fc2.{p}"),
            )
        ),
        Move("final_layer.adaLN_modulation.1.{p}", "final_layer.modulation.linear.{p}"),
        Move("final_layer.linear.{p}", "final_layer.linear.{p}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        tops = {key.partition(".")[0] for key in foreign.tensors}
        return {"double_blocks", "single_blocks", "img_in", "vector_in"} <= tops

    def config(self, foreign: Foreign) -> FluxConfig:
        width, packed = foreign.shape("img_in.weight")
        head = foreign.shape("double_blocks.0.img_attn.norm.query_norm.scale")[0]
        if head != sum(AXES):
            raise UserError(
                f"the rotary axes cannot be read from weights, and no published FLUX has heads of {head} features: "
                "give the configuration"
            )
        return FluxConfig(
            depth=foreign.count(r"double_blocks\.(\d+)\."),
            single_depth=foreign.count(r"single_blocks\.(\d+)\."),
            width=width,
            heads=width // head,
            channels=packed // 4,
            text_width=foreign.shape("txt_in.weight")[1],
            pooled_width=foreign.shape("vector_in.in_layer.weight")[1],
            guidance=GUIDANCE if "guidance_in.in_layer.weight" in foreign.tensors else None,
            mlp_ratio=foreign.shape("double_blocks.0.img_mlp.0.weight")[0] / width,
        )
