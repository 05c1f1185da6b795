"""Wan 2.1 and 2.2 in diffusers (WanTransformer3DModel): attention over space and time, cross-attention to the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditloom.adapters.call import Call
from ditloom.adapters.diffusers import DiffusersAdapter
from ditloom.adapters.foreign_block import ForeignBlock, attention_macs, mlp_site
from ditloom.adapters.guidance import Told, by_property
from ditloom.contracts.backbone import Block
from ditloom.contracts.layout import Layout, Span
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Streams
from ditloom.contracts.time import FLOW_1000
from ditloom.parts import cost
from ditloom.sites.visit import BareVisit, Visit


class WanBlock(ForeignBlock):
    """x += g1 Attn(mod(x)); x += Cross(norm(x), text); x += g2 MLP(mod(x)), norms and gates in float32."""

    sites = ("attn", "cross", "mlp")
    stages = ("modulated_in", "ff_hidden")
    row_sites = ("mlp",)

    def whole(self, streams: Streams, context: Context, given: Mapping[str, Any]) -> Streams:
        return streams.updated(image=self.inner(streams["image"], **context.shared))

    def inside(self, streams: Streams, context: Context, given: Mapping[str, Any], at: Visit | BareVisit) -> Streams:
        block, x, told = self.inner, streams["image"], context.shared
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self._chunks(told["temb"])
        h = at.tap("modulated_in", self._modulated(block.norm1, x, shift, scale))
        out = at.around("attn", lambda h: block.attn1(h, None, None, told["rotary_emb"]), h)
        x = (x.float() + out * gate).type_as(x)
        text = told["encoder_hidden_states"]
        h = block.norm2(x.float()).type_as(x)
        x = x + at.around("cross", lambda h: block.attn2(h, text, None, None), h)
        out = mlp_site(block.ffn, self._modulated(block.norm3, x, shift_mlp, scale_mlp), at)
        return streams.updated(image=(x.float() + out.float() * gate_mlp).type_as(x))

    def _chunks(self, temb: Tensor) -> list[Tensor]:
        """Shifts, scales and gates: temb [B, 6, D], or [B, n, 6, D] with a time of its own for every token."""
        if temb.ndim == 4:
            chunks = (self.inner.scale_shift_table.unsqueeze(0) + temb.float()).chunk(6, dim=2)
            return [chunk.squeeze(2) for chunk in chunks]
        return list((self.inner.scale_shift_table + temb.float()).chunk(6, dim=1))

    def _modulated(self, norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return (norm(x.float()) * (1 + scale) + shift).type_as(x)

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        shift, scale, *_ = self._chunks(context.shared["temb"])
        return self._modulated(self.inner.norm1, streams["image"], shift, scale)

    def macs(self, layout: Layout) -> dict[str, int]:
        n, pictures, block = layout.length(), layout.read("picture"), self.inner
        cross = attention_macs(block.attn2, n, layout.read("text"))
        if block.attn2.add_k_proj is not None:
            cross += cost.linear(block.attn2.add_k_proj, pictures) + cost.linear(block.attn2.add_v_proj, pictures)
            cross += cost.attention(n, pictures, block.attn2.to_q.out_features)
        return {"attn": attention_macs(block.attn1, n), "cross": cross, "mlp": cost.linears(block.ffn, n), "rest": 0}


@register("wan", paper="diffusers WanTransformer3DModel")
class Wan(DiffusersAdapter):
    """One call per branch, conditional first. Wan 2.2 changes to `transformer_2` midway: each has state of its own."""

    classes = ("WanTransformer3DModel",)
    pipelines = dict.fromkeys(
        ("WanPipeline", "WanImageToVideoPipeline"), Told(by_property, ("cond", "uncond"), apart=True)
    )
    roots = ("transformer", "transformer_2")
    time = FLOW_1000
    predicts = "v"
    lora_scale = "attention_kwargs"
    lacks = {
        "skip": "Wan has no long skips",
        "temporal": "Wan attends over space and time at once, in the site 'attn'",
    }

    def blocks(self, module: Any) -> list[Block]:
        return [WanBlock(block) for block in module.blocks]

    def embed(self, module: Any, call: Call) -> tuple[Streams, Context]:
        x, time, patch = call["hidden_states"], call["timestep"], module.config.patch_size
        grid = tuple(size // p for size, p in zip(x.shape[2:], patch, strict=True))
        rotary = module.rope(x)
        tokens = module.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()
        each = time.shape[1] if time.ndim == 2 else None
        temb, projected, text, pictures = module.condition_embedder(
            time.flatten(), call["encoder_hidden_states"], call["encoder_hidden_states_image"], timestep_seq_len=each
        )
        reads = [("text", text.shape[1])]
        if pictures is not None:
            reads.append(("picture", pictures.shape[1]))
            text = torch.concat([pictures, text], dim=1)
        told = {"encoder_hidden_states": text, "temb": projected.unflatten(-1, (6, -1)), "rotary_emb": rotary}
        layout = Layout((Span("image", tokens.shape[1]),), grid, tuple(reads))
        return Streams({"image": tokens}, layout), Context(time=temb, shared=told)

    def head(self, module: Any, streams: Streams, context: Context) -> Tensor:
        x, temb, table = streams["image"], context.time, module.scale_shift_table
        assert temb is not None
        shift, scale = (
            (table.unsqueeze(0) if temb.ndim == 3 else table).to(temb.device).add(temb.unsqueeze(-2)).chunk(2, dim=-2)
        )
        if temb.ndim == 3:
            shift, scale = shift.squeeze(2), scale.squeeze(2)
        x = (module.norm_out(x.float()) * (1 + scale.to(x.device)) + shift.to(x.device)).type_as(x)
        x = module.proj_out(x).reshape(len(x), *streams.layout.grid, *module.config.patch_size, -1)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def layout(self, module: Any) -> Layout:
        return Layout((Span("image", 32),), (2, 4, 4), (("text", 8),))

    def end_macs(self, module: Any, layout: Layout) -> dict[str, int]:
        n, told = layout.length(), module.condition_embedder
        embed = module.patch_embedding.weight.numel() * n + cost.linears(told.time_embedder, 1)
        embed += cost.linear(told.time_proj, 1) + cost.linears(told.text_embedder, layout.read("text"))
        if told.image_embedder is not None:
            embed += cost.linears(told.image_embedder, layout.read("picture"))
        return {"embed": embed, "head": cost.linear(module.proj_out, n)}
