"""HunyuanVideo in diffusers (HunyuanVideoTransformer3DModel): blocks of two streams, then of one set of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditloom.adapters.call import Call
from ditloom.adapters.diffusers import DiffusersAdapter, patch_macs
from ditloom.adapters.foreign_block import attention_macs
from ditloom.adapters.guidance import Told, by_negative
from ditloom.adapters.joint_block import JointBlock, Pair, SingleBlock
from ditloom.contracts.backbone import Block
from ditloom.contracts.layout import Layout, Span
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Streams
from ditloom.contracts.time import FLOW_1000
from ditloom.parts import cost

ORDER = ("temb", "attention_mask", "image_rotary_emb", "token_replace_emb", "num_tokens")


def call_whole(block: Any, streams: Streams, context: Context) -> Streams:
    """Every kind of block is called alike, by position; it returns (video, text)."""
    told = (context.shared[name] for name in ORDER)
    image, text = block(streams["image"], streams["text"], *told)
    return streams.updated(image=image, text=text)


class HunyuanVideoBlock(JointBlock):
    """Video and text with weights of their own."""

    image_first = True

    def whole(self, streams: Streams, context: Context, given: Mapping[str, Any]) -> Streams:
        return call_whole(self.inner, streams, context)

    def attend(self, h: Pair, told: Mapping[str, Any]) -> Pair:
        image, text = self.inner.attn(
            hidden_states=h["image"],
            encoder_hidden_states=h["text"],
            attention_mask=told["attention_mask"],
            image_rotary_emb=told["image_rotary_emb"],
        )
        return {"image": image, "text": text}


class HunyuanVideoSingleBlock(SingleBlock):
    """Video, then text, through the same weights."""

    image_first = True

    def whole(self, streams: Streams, context: Context, given: Mapping[str, Any]) -> Streams:
        return call_whole(self.inner, streams, context)

    def attend(self, h: Tensor, streams: Streams, told: Mapping[str, Any]) -> Tensor:
        n = streams["image"].shape[1]
        pair = self.inner.attn(
            hidden_states=h[:, :n],
            encoder_hidden_states=h[:, n:],
            attention_mask=told["attention_mask"],
            image_rotary_emb=told["image_rotary_emb"],
        )
        return torch.cat(pair, dim=1)


class TokenReplaceBlock(HunyuanVideoBlock):
    """A block of the image-to-video model, which modulates the first frame apart: called whole, no sites inside."""

    sites = ()
    stages = ()


class TokenReplaceSingleBlock(HunyuanVideoSingleBlock):
    """The same of the later blocks."""

    sites = ()
    stages = ()


@register("hunyuan-video", paper="diffusers HunyuanVideoTransformer3DModel")
class HunyuanVideo(DiffusersAdapter):
    """True guidance comes in calls of its own, after the conditional one; the distilled model has none."""

    classes = ("HunyuanVideoTransformer3DModel",)
    pipelines = {"HunyuanVideoPipeline": Told(by_negative, ("cond", "uncond"), apart=True)}
    time = FLOW_1000
    predicts = "v"
    lora_scale = "attention_kwargs"
    lacks = {
        "cross": "HunyuanVideo reads text in its joint attention and has no cross-attention",
        "skip": "HunyuanVideo has no long skips",
        "temporal": "HunyuanVideo attends over space and time at once, in the site 'attn'",
    }

    def blocks(self, module: Any) -> list[Block]:
        replaces = module.config.image_condition_type == "token_replace"
        double, single = (
            (TokenReplaceBlock, TokenReplaceSingleBlock) if replaces else (HunyuanVideoBlock, HunyuanVideoSingleBlock)
        )
        first = [double(block) for block in module.transformer_blocks]
        return [*first, *(single(block) for block in module.single_transformer_blocks)]

    def embed(self, module: Any, call: Call) -> tuple[Streams, Context]:
        x, mask = call["hidden_states"], call["encoder_attention_mask"]
        p, p_t = module.config.patch_size, module.config.patch_size_t
        grid = (x.shape[2] // p_t, x.shape[3] // p, x.shape[4] // p)
        rotary = module.rope(x)
        temb, replaced = module.time_text_embed(call["timestep"], call["pooled_projections"], call["guidance"])
        tokens = module.x_embedder(x)
        text = module.context_embedder(call["encoder_hidden_states"], call["timestep"], mask)
        told = {
            "temb": temb,
            "attention_mask": joint_mask(tokens.shape[1], text.shape[1], mask),
            "image_rotary_emb": rotary,
            "token_replace_emb": replaced,
            "num_tokens": grid[1] * grid[2],
        }
        layout = Layout((Span("image", tokens.shape[1]), Span("text", text.shape[1], "text")), grid)
        return Streams({"image": tokens, "text": text}, layout), Context(time=temb, shared=told)

    def head(self, module: Any, streams: Streams, context: Context) -> Tensor:
        x = module.proj_out(module.norm_out(streams["image"], context.time))
        p, p_t = module.config.patch_size, module.config.patch_size_t
        x = x.reshape(len(x), *streams.layout.grid, -1, p_t, p, p)
        return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def layout(self, module: Any) -> Layout:
        return Layout((Span("image", 32), Span("text", 8, "text")), (2, 4, 4))

    def end_macs(self, module: Any, layout: Layout) -> dict[str, int]:
        n, m = layout.length("image"), layout.length("text")
        embed = patch_macs(module.x_embedder, n) + cost.linears(module.time_text_embed, 1) + _refiner_macs(module, m)
        return {"embed": embed, "head": cost.linears(module.norm_out, 1) + cost.linear(module.proj_out, n)}


def joint_mask(tokens: int, words: int, mask: Tensor) -> Tensor:
    """Which keys are real [B, 1, 1, n + m]: all of the video, and as many words as the text has."""
    real = tokens + mask.sum(dim=1, dtype=torch.int)
    return (torch.arange(tokens + words, device=mask.device)[None] < real[:, None])[:, None, None]


def _refiner_macs(module: Any, words: int) -> int:
    """The blocks that refine the text before it meets the video."""
    refiner = module.context_embedder
    total = cost.linears(refiner.time_text_embed, 1) + cost.linear(refiner.proj_in, words)
    for block in refiner.token_refiner.refiner_blocks:
        total += attention_macs(block.attn, words) + cost.linears(block.ff, words) + cost.linears(block.norm_out, 1)
    return total
