"""Stable Diffusion 3 and 3.5 in diffusers (SD3Transformer2DModel)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ditloom.adapters.call import Call
from ditloom.adapters.diffusers import CONTROLNET, DiffusersAdapter, patch_macs
from ditloom.adapters.foreign_block import attention_macs
from ditloom.adapters.guidance import Told, by_property
from ditloom.adapters.joint_block import JointBlock, Pair
from ditloom.contracts.backbone import Block
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Span
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Streams
from ditloom.contracts.time import FLOW_1000
from ditloom.parts import cost
from ditloom.parts.patches import unpatchify
from ditloom.sites.visit import BareVisit, Visit


class SD3Block(JointBlock):
    """In the last block the text is only attended to; in some there is a second attention among image tokens."""

    def __init__(self, inner: Any):
        super().__init__(inner)
        second = ("attn2",) if inner.use_dual_attention else ()
        self.sites = ("attn", *second, "mlp", *(() if inner.context_pre_only else ("mlp_text",)))

    def text_norm(self, y: Tensor, told: Mapping[str, Any]) -> Any:
        if self.inner.context_pre_only:
            return (self.inner.norm1_context(y, told["temb"]),)
        return super().text_norm(y, told)

    def attend(self, h: Pair, told: Mapping[str, Any]) -> Pair:
        extra = told["joint_attention_kwargs"] or {}
        image, text = self.inner.attn(hidden_states=h["image"], encoder_hidden_states=h["text"], **extra)
        return {"image": image} if self.inner.context_pre_only else {"image": image, "text": text}

    def second_attention(self, x: Tensor, rest: list[Tensor], told: Mapping[str, Any], at: Visit | BareVisit) -> Tensor:
        if not self.inner.use_dual_attention:
            return x
        h, gate = rest
        extra = told["joint_attention_kwargs"] or {}
        return x + gate.unsqueeze(1) * at.around("attn2", lambda h: self.inner.attn2(hidden_states=h, **extra), h)

    def update_text(self, y: Tensor, out: Pair, rest: list[Tensor], at: Visit | BareVisit) -> Tensor:
        return y if self.inner.context_pre_only else super().update_text(y, out, rest, at)

    def macs(self, layout: Layout) -> dict[str, int]:
        costs = super().macs(layout)
        if self.inner.use_dual_attention:
            costs["attn2"] = attention_macs(self.inner.attn2, layout.length("image"))
        return costs


@register("sd3", paper="diffusers SD3Transformer2DModel")
class SD3(DiffusersAdapter):
    """Rows [uncond, cond] when guided. A further call of skip-layer guidance is left to the original forward."""

    classes = ("SD3Transformer2DModel",)
    pipelines = dict.fromkeys(
        ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
        Told(by_property),
    )
    time = FLOW_1000
    predicts = "v"
    refuses = {"block_controlnet_hidden_states": CONTROLNET}
    passes = ("skip_layers",)
    lora_scale = "joint_attention_kwargs"
    lacks = {
        "cross": "SD3 reads text in its joint attention and has no cross-attention",
        "skip": "SD3 has no long skips",
        "temporal": "SD3 has no temporal attention",
    }

    def blocks(self, module: Any) -> list[Block]:
        return [SD3Block(block) for block in module.transformer_blocks]

    def check(self, values: Mapping[str, Any]) -> None:
        super().check(values)
        refuse_image_prompts(values.get("joint_attention_kwargs"))

    def embed(self, module: Any, call: Call) -> tuple[Streams, Context]:
        x, p = call["hidden_states"], module.config.patch_size
        grid = (x.shape[-2] // p, x.shape[-1] // p)
        tokens = module.pos_embed(x).contiguous()
        temb = module.time_text_embed(call["timestep"], call["pooled_projections"])
        text = module.context_embedder(call["encoder_hidden_states"])
        layout = Layout((Span("image", tokens.shape[1]), Span("text", text.shape[1], "text")), grid)
        told = {"temb": temb, "joint_attention_kwargs": call["joint_attention_kwargs"]}
        return Streams({"image": tokens, "text": text}, layout), Context(time=temb, shared=told)

    def head(self, module: Any, streams: Streams, context: Context) -> Tensor:
        x = module.proj_out(module.norm_out(streams["image"], context.time))
        return unpatchify(x, module.config.patch_size, streams.layout.grid)

    def layout(self, module: Any) -> Layout:
        return Layout((Span("image", 16), Span("text", 8, "text")), (4, 4))

    def end_macs(self, module: Any, layout: Layout) -> dict[str, int]:
        n = layout.length("image")
        embed = patch_macs(module.pos_embed, n) + cost.linears(module.time_text_embed, 1)
        embed += cost.linear(module.context_embedder, layout.length("text"))
        return {"embed": embed, "head": cost.linears(module.norm_out, 1) + cost.linear(module.proj_out, n)}


def refuse_image_prompts(told: Mapping[str, Any] | None) -> None:
    """Refuse what an IP-adapter hands to attention."""
    if told and ("ip_adapter_image_embeds" in told or "ip_hidden_states" in told):
        raise UserError("methods cannot act on a call with image prompts (an IP-adapter adds to attention)")
