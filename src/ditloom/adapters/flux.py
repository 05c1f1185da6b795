"""FLUX.1 in diffusers (FluxTransformer2DModel): blocks of two streams, then blocks of one set of weights for both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditloom.adapters.call import Call
from ditloom.adapters.diffusers import CONTROLNET, DiffusersAdapter
from ditloom.adapters.guidance import Told, by_negative
from ditloom.adapters.joint_block import JointBlock, Pair, SingleBlock
from ditloom.adapters.sd3 import refuse_image_prompts
from ditloom.contracts.backbone import Block
from ditloom.contracts.layout import Layout, Span
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Streams
from ditloom.contracts.time import FLOW
from ditloom.parts import cost


class FluxBlock(JointBlock):
    """Image and text with weights of their own."""

    def attend(self, h: Pair, told: Mapping[str, Any]) -> Pair:
        image, text = self.inner.attn(
            hidden_states=h["image"],
            encoder_hidden_states=h["text"],
            image_rotary_emb=told["image_rotary_emb"],
            **(told["joint_attention_kwargs"] or {}),
        )
        return {"image": image, "text": text}

    def update_text(self, y: Tensor, out: Pair, rest: list[Tensor], at: Any) -> Tensor:
        return _clipped(super().update_text(y, out, rest, at))


class FluxSingleBlock(SingleBlock):
    """Text, then image, through the same weights."""

    def attend(self, h: Tensor, streams: Streams, told: Mapping[str, Any]) -> Tensor:
        extra = told["joint_attention_kwargs"] or {}
        return self.inner.attn(hidden_states=h, image_rotary_emb=told["image_rotary_emb"], **extra)

    def gated(self, y: Tensor, gates: list[Tensor], x: Tensor, told: Mapping[str, Any]) -> Tensor:
        return _clipped(super().gated(y, gates, x, told))


@register("flux", paper="diffusers FluxTransformer2DModel")
class Flux(DiffusersAdapter):
    """Time arrives as sigma in [0, 1]. True guidance comes in calls of its own, after the conditional one."""

    classes = ("FluxTransformer2DModel",)
    pipelines = {"FluxPipeline": Told(by_negative, ("cond", "uncond"), apart=True)}
    time = FLOW
    predicts = "v"
    static = ("img_ids", "txt_ids")
    refuses = {"controlnet_block_samples": CONTROLNET, "controlnet_single_block_samples": CONTROLNET}
    lora_scale = "joint_attention_kwargs"
    lacks = {
        "cross": "FLUX reads text in its joint attention and has no cross-attention",
        "skip": "FLUX has no long skips",
        "temporal": "FLUX has no temporal attention",
    }

    def blocks(self, module: Any) -> list[Block]:
        double = [FluxBlock(block) for block in module.transformer_blocks]
        return [*double, *(FluxSingleBlock(block) for block in module.single_transformer_blocks)]

    def values_of(self, module: Any, timesteps: Tensor) -> Tensor:
        return timesteps / 1000

    def check(self, values: Mapping[str, Any]) -> None:
        super().check(values)
        refuse_image_prompts(values.get("joint_attention_kwargs"))

    def embed(self, module: Any, call: Call) -> tuple[Streams, Context]:
        tokens = module.x_embedder(call["hidden_states"])
        times = [call[name].to(tokens.dtype) * 1000 for name in ("timestep", "guidance") if call[name] is not None]
        temb = module.time_text_embed(*times, call["pooled_projections"])
        text = module.context_embedder(call["encoder_hidden_states"])
        ids = torch.cat([_flat(call["txt_ids"]), _flat(call["img_ids"])], dim=0)
        layout = Layout((Span("text", text.shape[1], "text"), Span("image", tokens.shape[1])))
        told = {"temb": temb, "image_rotary_emb": module.pos_embed(ids)}
        told["joint_attention_kwargs"] = call["joint_attention_kwargs"]
        return Streams({"text": text, "image": tokens}, layout), Context(time=temb, shared=told)

    def head(self, module: Any, streams: Streams, context: Context) -> Tensor:
        return module.proj_out(module.norm_out(streams["image"], context.time))

    def layout(self, module: Any) -> Layout:
        return Layout((Span("text", 8, "text"), Span("image", 16)))

    def end_macs(self, module: Any, layout: Layout) -> dict[str, int]:
        n = layout.length("image")
        embed = cost.linear(module.x_embedder, n) + cost.linear(module.context_embedder, layout.length("text"))
        embed += cost.linears(module.time_text_embed, 1)
        return {"embed": embed, "head": cost.linears(module.norm_out, 1) + cost.linear(module.proj_out, n)}


def _flat(ids: Tensor) -> Tensor:
    """Position ids [n, axes]; older callers hand in a batch of them."""
    return ids[0] if ids.ndim == 3 else ids


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
