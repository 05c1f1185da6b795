"""HiDream-I1 as it is published: diffusers' HiDreamImageTransformer2DModel, a folder of config.json and weights.

One matrix modulates both streams of a double block, the image's vectors first. The last caption projection is T5's, the
ones before it the language model's. Tokens are (row, column, channel) inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ditloom.backbones.hidream import HiDreamConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, refuse_unless
from ditloom.hub.formats.diffusers_flux import singles
from ditloom.hub.keymap import CHANNELS_LAST, Entry, Experts, Fuse, KeyMap, Move, Part

CLASS = "diffusers' HiDreamImageTransformer2DModel"
DOUBLE, SINGLE = "double_stream_blocks.{i}.block.", "single_stream_blocks.{i}.block."


def doubles(config: Any) -> range:
    """Where the double blocks stand."""
    return range(config.depth)


@dataclass(frozen=True)
class AfterLayers(Move):
    """What they number one higher than the last block."""

    def claims(self, name: str, config: Any) -> dict[str, Any] | None:
        found = super().claims(name, config)
        return None if found is None else {**found, "i": config.depth + config.single_depth}


def _attention(theirs: str, ours: str, end: str, **at: Any) -> Iterator[Entry]:
    yield Fuse(tuple(f"{theirs}attn1.to_{x}{end}.{{p}}" for x in "qkv"), f"{ours}attn.qkv.{{p}}", **at)
    yield Move(f"{theirs}attn1.to_out{end}.{{p}}", f"{ours}attn.proj.{{p}}", **at)
    for x in "qk":
        yield Move(f"{theirs}attn1.{x}_rms_norm{end}.weight", f"{ours}attn.{x}_norm.norm.weight", **at)


def _swiglu(theirs: str, ours: str, **at: Any) -> Iterator[Entry]:
    yield Fuse((f"{theirs}.w1.weight", f"{theirs}.w3.weight"), f"{ours}.w12.weight", **at)
    yield Move(f"{theirs}.w2.weight", f"{ours}.w3.weight", **at)


def _sparse(theirs: str, ours: str, **at: Any) -> Iterator[Entry]:
    experts = f"{theirs}ff_i.experts.{{e}}."
    yield Move(f"{theirs}ff_i.gate.weight", f"{ours}mlp.router.weight", **at)
    yield Experts((experts + "w1.weight", experts + "w3.weight"), f"{ours}mlp.experts.w12", **at)
    yield Experts((experts + "w2.weight",), f"{ours}mlp.experts.w3", **at)
    yield from _swiglu(f"{theirs}ff_i.shared_experts", f"{ours}mlp.shared", **at)


IN_DOUBLES: dict[str, Any] = {"where": doubles}
IN_SINGLES: dict[str, Any] = {"where": singles, "from_zero": True}


@register("hidream", paper="HiDream-I1, arXiv 2505.22705")
class HiDreamFormat(Format):
    """HiDream-I1 Full, Dev and Fast, which are one network, and any HiDream of ours."""

    family: ClassVar[str] = "hidream"
    folder: ClassVar[bool] = True
    keymap: ClassVar[KeyMap] = KeyMap(
        Move("x_embedder.proj.{p}", "x_embedder.proj.{p}", CHANNELS_LAST),
        *(
            Move(f"{theirs}.linear_{n + 1}.{{p}}", f"{ours}_embedder.mlp.{2 * n}.{{p}}")
            for theirs, ours in (("t_embedder.timestep_embedder", "t"), ("p_embedder.pooled_embedder", "pooled"))
            for n in range(2)
        ),
        Move("caption_projection.{i}.linear.weight", "llama_embedders.{i}.weight"),
        AfterLayers("caption_projection.{i}.linear.weight", "text_embedder.weight"),
        Part(DOUBLE + "adaLN_modulation.1.{p}", "blocks.{i}.image.modulation.linear.{p}"),
        Part(DOUBLE + "adaLN_modulation.1.{p}", "blocks.{i}.text.modulation.linear.{p}", last=True),
        *_attention(DOUBLE, "blocks.{i}.image.", "", **IN_DOUBLES),
        *_attention(DOUBLE, "blocks.{i}.text.", "_t", **IN_DOUBLES),
        *_sparse(DOUBLE, "blocks.{i}.image.", **IN_DOUBLES),
        *_swiglu(DOUBLE + "ff_t", "blocks.{i}.text.mlp", **IN_DOUBLES),
        Move(SINGLE + "adaLN_modulation.1.{p}", "blocks.{i}.modulation.linear.{p}", **IN_SINGLES),
        *_attention(SINGLE, "blocks.{i}.", "", **IN_SINGLES),
        *_sparse(SINGLE, "blocks.{i}.", **IN_SINGLES),
        Move("final_layer.adaLN_modulation.1.{p}", "final_layer.modulation.linear.{p}"),
        Move("final_layer.linear.{p}", "final_layer.linear.{p}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        tops = {key.partition(".")[0] for key in foreign.tensors}
        return {"double_stream_blocks", "single_stream_blocks", "caption_projection"} <= tops

    def config(self, foreign: Foreign) -> HiDreamConfig:
        given = foreign.settings
        width, packed = foreign.shape("x_embedder.proj.weight")
        depth = foreign.count(r"double_stream_blocks\.(\d+)\.")
        single_depth = foreign.count(r"single_stream_blocks\.(\d+)\.")
        axes = tuple(given.get("axes_dims_rope", HiDreamConfig.axes))
        return HiDreamConfig(
            depth=depth,
            single_depth=single_depth,
            width=width,
            heads=given.get("num_attention_heads", width // sum(axes)),
            channels=packed // 4,
            text_width=foreign.shape(f"caption_projection.{depth + single_depth}.linear.weight")[1],
            llama_width=foreign.shape("caption_projection.0.linear.weight")[1],
            layers=tuple(given.get("llama_layers", HiDreamConfig.layers)),
            pooled_width=foreign.shape("p_embedder.pooled_embedder.linear_1.weight")[1],
            experts=foreign.shape("double_stream_blocks.0.block.ff_i.gate.weight")[0],
            top_k=given.get("num_activated_experts", HiDreamConfig.top_k),
            axes=axes,
        )

    def settings(self, config: HiDreamConfig) -> dict[str, Any]:
        refuse_unless(config, CLASS, theta=10000.0, patch=2)
        return {
            "_class_name": "HiDreamImageTransformer2DModel",
            "patch_size": 2,
            "in_channels": config.channels,
            "out_channels": config.channels,
            "num_layers": config.depth,
            "num_single_layers": config.single_depth,
            "attention_head_dim": config.width // config.heads,
            "num_attention_heads": config.heads,
            "caption_channels": [config.text_width, config.llama_width],
            "text_emb_dim": config.pooled_width,
            "num_routed_experts": config.experts,
            "num_activated_experts": config.top_k,
            "axes_dims_rope": list(config.axes),
            "max_resolution": [config.image_size, config.image_size],
            "llama_layers": list(config.layers),
        }
