"""Sana in diffusers (SanaTransformer2DModel): linear attention, cross-attention to the text, convolutional MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ditloom.adapters.call import Call
from ditloom.adapters.diffusers import CONTROLNET, DiffusersAdapter, mask_bias, patch_macs
from ditloom.adapters.foreign_block import ForeignBlock, attention_macs
from ditloom.adapters.guidance import Told, by_property
from ditloom.contracts.backbone import Block
from ditloom.contracts.layout import Layout, Span
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Streams
from ditloom.contracts.time import FLOW_1000, TimeInput
from ditloom.parts import cost
from ditloom.sites.visit import BareVisit, Visit


class SanaBlock(ForeignBlock):
    """x += g1 Attn(mod(x)); x += Cross(x, text); x += g2 Conv(mod(x)). The MLP mixes neighbours: no rows alone."""

    sites = ("attn", "cross", "mlp")
    stages = ("modulated_in",)

    def whole(self, streams: Streams, context: Context, given: Mapping[str, Any]) -> Streams:
        return streams.updated(image=self.inner(streams["image"], **context.shared))

    def inside(self, streams: Streams, context: Context, given: Mapping[str, Any], at: Visit | BareVisit) -> Streams:
        block, x, told = self.inner, streams["image"], context.shared
        h, gate, shift, scale, gate_mlp = self._modulated(x, told)
        x = x + gate * at.around("attn", block.attn1, at.tap("modulated_in", h))

        def read(x: Tensor) -> Tensor:
            mask = told["encoder_attention_mask"]
            return block.attn2(x, encoder_hidden_states=told["encoder_hidden_states"], attention_mask=mask)

        x = at.around("cross", read, x) + x

        def convolve(h: Tensor) -> Tensor:
            pictures = h.unflatten(1, (told["height"], told["width"])).permute(0, 3, 1, 2)
            return block.ff(pictures).flatten(2, 3).permute(0, 2, 1)

        h = block.norm2(x) * (1 + scale) + shift
        return streams.updated(image=x + gate_mlp * at.around("mlp", convolve, h))

    def _modulated(self, x: Tensor, told: Mapping[str, Any]) -> tuple[Tensor, ...]:
        table = self.inner.scale_shift_table[None] + told["timestep"].reshape(x.shape[0], 6, -1)
        shift, scale, *rest = table.chunk(6, dim=1)
        h = self.inner.norm1(x) * (1 + scale) + shift
        return h.to(x.dtype), rest[0], *rest[1:]

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        return self._modulated(streams["image"], context.shared)[0]

    def macs(self, layout: Layout) -> dict[str, int]:
        n, block = layout.length(), self.inner
        convolutions = (m for m in block.ff.modules() if isinstance(m, nn.Conv2d))
        return {
            "attn": self._linear_attention(n),
            "cross": attention_macs(block.attn2, n, layout.read("text")),
            "mlp": sum(cost.convolution(m, n) for m in convolutions),
            "rest": 0,
        }

    def _linear_attention(self, n: int) -> int:
        """Projections, and per head two products with a matrix of (d + 1) d in place of the softmax."""
        attention = self.inner.attn1
        width = attention.to_q.out_features
        return cost.linears(attention, n) + 2 * n * width * (width // attention.heads + 1)


@register("sana", paper="diffusers SanaTransformer2DModel")
class Sana(DiffusersAdapter):
    """Rows [uncond, cond] when guided. Time arrives times the `timestep_scale` of the module's configuration."""

    classes = ("SanaTransformer2DModel",)
    pipelines = {"SanaPipeline": Told(by_property)}
    predicts = "v"
    refuses = {"controlnet_block_samples": CONTROLNET}
    lora_scale = "attention_kwargs"
    lacks = {"skip": "Sana has no long skips", "temporal": "Sana has no temporal attention"}

    def time_of(self, module: Any) -> TimeInput:
        return TimeInput(scale=FLOW_1000.scale * module.config.timestep_scale)

    def values_of(self, module: Any, timesteps: Tensor) -> Tensor:
        return timesteps * module.config.timestep_scale

    def blocks(self, module: Any) -> list[Block]:
        return [SanaBlock(block) for block in module.transformer_blocks]

    def embed(self, module: Any, call: Call) -> tuple[Streams, Context]:
        x, p = call["hidden_states"], module.config.patch_size
        grid = (x.shape[-2] // p, x.shape[-1] // p)
        tokens = module.patch_embed(x)
        told = {"guidance": call["guidance"]} if call["guidance"] is not None else {"batch_size": len(x)}
        time, embedded = module.time_embed(call["timestep"], **told, hidden_dtype=tokens.dtype)
        text = module.caption_projection(call["encoder_hidden_states"]).view(len(x), -1, tokens.shape[-1])
        text = module.caption_norm(text)
        shared: dict[str, Any] = {
            name: mask_bias(call[name], x) for name in ("attention_mask", "encoder_attention_mask")
        }
        shared |= {"encoder_hidden_states": text, "timestep": time, "height": grid[0], "width": grid[1]}
        layout = Layout((Span("image", tokens.shape[1]),), grid, (("text", text.shape[1]),))
        return Streams({"image": tokens}, layout), Context(time=embedded, shared=shared)

    def head(self, module: Any, streams: Streams, context: Context) -> Tensor:
        x = module.proj_out(module.norm_out(streams["image"], context.time, module.scale_shift_table))
        (height, width), p = streams.layout.grid, module.config.patch_size
        x = x.reshape(len(x), height, width, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), -1, height * p, width * p)

    def layout(self, module: Any) -> Layout:
        return Layout((Span("image", 16),), (4, 4), (("text", 8),))

    def end_macs(self, module: Any, layout: Layout) -> dict[str, int]:
        n = layout.length()
        embed = patch_macs(module.patch_embed, n) + cost.linears(module.time_embed, 1)
        embed += cost.linears(module.caption_projection, layout.read("text"))
        return {"embed": embed, "head": cost.linear(module.proj_out, n)}
