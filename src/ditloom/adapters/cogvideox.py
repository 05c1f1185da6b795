"""CogVideoX in diffusers (CogVideoXTransformer3DModel): text and video through the same weights in one attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditloom.adapters.call import Call
from ditloom.adapters.diffusers import DiffusersAdapter, patch_macs
from ditloom.adapters.foreign_block import ForeignBlock, attention_macs, feed_forward
from ditloom.adapters.guidance import Told, by_scale
from ditloom.contracts.backbone import Block
from ditloom.contracts.layout import Layout, Span
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Streams
from ditloom.contracts.time import DISCRETE_1000
from ditloom.parts import cost
from ditloom.sites.visit import BareVisit, Visit


class CogVideoXBlock(ForeignBlock):
    """Per stream x += g1 Attn(mod(x)); x += g2 MLP(mod(x)), modulated apart and computed together.

    The site "attn" passes a dict by stream, "mlp" the tokens of text and video in this order.
    """

    sites = ("attn", "mlp")
    stages = ("modulated_in", "ff_hidden")

    def whole(self, streams: Streams, context: Context, given: Mapping[str, Any]) -> Streams:
        image, text = self.inner(
            hidden_states=streams["image"], encoder_hidden_states=streams["text"], **context.shared["block"]
        )
        return streams.updated(image=image, text=text)

    def inside(self, streams: Streams, context: Context, given: Mapping[str, Any], at: Visit | BareVisit) -> Streams:
        block, told, x, y = self.inner, context.shared["block"], streams["image"], streams["text"]
        hx, hy, gate, text_gate = block.norm1(x, y, told["temb"])

        def attend(h: dict[str, Tensor]) -> dict[str, Tensor]:
            image, text = block.attn1(
                hidden_states=h["image"],
                encoder_hidden_states=h["text"],
                image_rotary_emb=told["image_rotary_emb"],
                **(told["attention_kwargs"] or {}),
            )
            return {"image": image, "text": text}

        h = {"image": at.tap("modulated_in", hx), "text": at.tap("modulated_in", hy, "text")}
        out = at.around("attn", attend, h)
        x, y = x + gate * out["image"], y + text_gate * out["text"]
        hx, hy, gate, text_gate = block.norm2(x, y, told["temb"])
        ff = at.around("mlp", lambda h: feed_forward(block.ff, h, at), torch.cat([hy, hx], dim=1))
        words = y.shape[1]
        return streams.updated(image=x + gate * ff[:, words:], text=y + text_gate * ff[:, :words])

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        return self.inner.norm1(streams["image"], streams["text"], context.shared["block"]["temb"])[0]

    def macs(self, layout: Layout) -> dict[str, int]:
        n, block = layout.length(), self.inner
        rest = cost.linears(block.norm1, 1) + cost.linears(block.norm2, 1)
        return {"attn": attention_macs(block.attn1, n), "mlp": cost.linears(block.ff, n), "rest": rest}


@register("cogvideox", paper="diffusers CogVideoXTransformer3DModel")
class CogVideoX(DiffusersAdapter):
    """Rows [uncond, cond] when guided. x is [B, F, C, H, W]; the embedding of the time is what TeaCache looks at."""

    classes = ("CogVideoXTransformer3DModel",)
    pipelines = dict.fromkeys(
        (
            "CogVideoXPipeline",
            "CogVideoXImageToVideoPipeline",
            "CogVideoXVideoToVideoPipeline",
            "CogVideoXFunControlPipeline",
        ),
        Told(by_scale),
    )
    time = DISCRETE_1000
    predicts = "v"
    static = ("image_rotary_emb", "ofs")
    lora_scale = "attention_kwargs"
    lacks = {
        "cross": "CogVideoX reads text in its joint attention and has no cross-attention",
        "skip": "CogVideoX has no long skips",
        "temporal": "CogVideoX attends over space and time at once, in the site 'attn'",
    }

    def blocks(self, module: Any) -> list[Block]:
        return [CogVideoXBlock(block) for block in module.transformer_blocks]

    def embed(self, module: Any, call: Call) -> tuple[Streams, Context]:
        x, text = call["hidden_states"], call["encoder_hidden_states"]
        emb = module.time_embedding(module.time_proj(call["timestep"]).to(dtype=x.dtype), call["timestep_cond"])
        if module.ofs_embedding is not None:
            emb = emb + module.ofs_embedding(module.ofs_proj(call["ofs"]).to(dtype=x.dtype))
        tokens = module.embedding_dropout(module.patch_embed(text, x))
        words, p, p_t = text.shape[1], module.config.patch_size, module.config.patch_size_t or 1
        grid = ((x.shape[1] + p_t - 1) // p_t, x.shape[3] // p, x.shape[4] // p)
        told = {name: call[name] for name in ("image_rotary_emb", "attention_kwargs")}
        layout = Layout((Span("text", words, "text"), Span("image", tokens.shape[1] - words)), grid)
        streams = Streams({"text": tokens[:, :words], "image": tokens[:, words:]}, layout)
        return streams, Context(time=emb, shared={"block": {"temb": emb, **told}})

    def head(self, module: Any, streams: Streams, context: Context) -> Tensor:
        x = module.norm_out(module.norm_final(streams["image"]), temb=context.time)
        p, p_t = module.config.patch_size, module.config.patch_size_t
        x = module.proj_out(x)
        if p_t is None:
            x = x.reshape(len(x), *streams.layout.grid, -1, p, p)
            return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
        x = x.reshape(len(x), *streams.layout.grid, -1, p_t, p, p)
        return x.permute(0, 1, 5, 4, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2)

    def layout(self, module: Any) -> Layout:
        return Layout((Span("text", 8, "text"), Span("image", 32)), (2, 4, 4))

    def end_macs(self, module: Any, layout: Layout) -> dict[str, int]:
        n = layout.length("image")
        embed = patch_macs(module.patch_embed, n) + cost.linears(module.time_embedding, 1)
        embed += cost.linear(module.patch_embed.text_proj, layout.length("text"))
        if module.ofs_embedding is not None:
            embed += cost.linears(module.ofs_embedding, 1)
        return {"embed": embed, "head": cost.linears(module.norm_out, 1) + cost.linear(module.proj_out, n)}
