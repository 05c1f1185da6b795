"""PixArt-alpha and PixArt-Sigma in diffusers (PixArtTransformer2DModel): text by cross-attention, adaLN-single."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ditloom.adapters.basic_block import BasicBlock
from ditloom.adapters.call import Call
from ditloom.adapters.diffusers import DiffusersAdapter, mask_bias, patch_macs
from ditloom.adapters.guidance import Told, by_encoding
from ditloom.contracts.backbone import Block
from ditloom.contracts.layout import Layout, Span
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Streams
from ditloom.contracts.time import DISCRETE_1000
from ditloom.parts import cost
from ditloom.parts.patches import unpatchify


@register("pixart", paper="diffusers PixArtTransformer2DModel")
class PixArt(DiffusersAdapter):
    """Rows [uncond, cond] when guided, as the pipeline tells its text encoder."""

    classes = ("PixArtTransformer2DModel",)
    pipelines = dict.fromkeys(("PixArtAlphaPipeline", "PixArtSigmaPipeline"), Told(by_encoding))
    time = DISCRETE_1000
    predicts = "eps, variance"
    lacks = {"skip": "PixArt has no long skips", "temporal": "PixArt has no temporal attention"}

    def blocks(self, module: Any) -> list[Block]:
        return [BasicBlock(block) for block in module.transformer_blocks]

    def embed(self, module: Any, call: Call) -> tuple[Streams, Context]:
        x, p = call["hidden_states"], module.config.patch_size
        masks = {name: mask_bias(call[name], x) for name in ("attention_mask", "encoder_attention_mask")}
        grid = (x.shape[-2] // p, x.shape[-1] // p)
        tokens = module.pos_embed(x)
        time, embedded = module.adaln_single(
            call["timestep"], call["added_cond_kwargs"], batch_size=len(x), hidden_dtype=tokens.dtype
        )
        text = call["encoder_hidden_states"]
        if module.caption_projection is not None:
            text = module.caption_projection(text).view(len(x), -1, tokens.shape[-1])
        layout = Layout((Span("image", tokens.shape[1]),), grid, (("text", text.shape[1]),))
        told = {"timestep": time, "encoder_hidden_states": text, **masks}
        told["cross_attention_kwargs"] = call["cross_attention_kwargs"]
        return Streams({"image": tokens}, layout), Context(time=embedded, shared=told)

    def head(self, module: Any, streams: Streams, context: Context) -> Tensor:
        assert context.time is not None
        table = module.scale_shift_table[None] + context.time[:, None].to(module.scale_shift_table.device)
        shift, scale = table.chunk(2, dim=1)
        x = module.norm_out(streams["image"]) * (1 + scale) + shift
        return unpatchify(module.proj_out(x), module.config.patch_size, streams.layout.grid)

    def layout(self, module: Any) -> Layout:
        return Layout((Span("image", 16),), (4, 4), (("text", 8),))

    def end_macs(self, module: Any, layout: Layout) -> dict[str, int]:
        n = layout.length()
        embed = patch_macs(module.pos_embed, n) + cost.linears(module.adaln_single, 1)
        if module.caption_projection is not None:
            embed += cost.linears(module.caption_projection, layout.read("text"))
        return {"embed": embed, "head": cost.linear(module.proj_out, n)}
