"""HunyuanDiT in diffusers (HunyuanDiT2DModel): cross-attention to two texts, and long skips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditloom.adapters.call import Call
from ditloom.adapters.diffusers import CONTROLNET, DiffusersAdapter, patch_macs
from ditloom.adapters.foreign_block import ForeignBlock, attention_macs, mlp_site
from ditloom.adapters.guidance import Told, by_property
from ditloom.contracts.backbone import Block
from ditloom.contracts.layout import Layout, Span
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Streams
from ditloom.contracts.time import DISCRETE_1000
from ditloom.parts import cost
from ditloom.parts.patches import unpatchify
from ditloom.sites.visit import BareVisit, Visit


class HunyuanDiTBlock(ForeignBlock):
    """x = skip_linear [x, skip] in the second half; x += Attn(norm(x) + shift); x += Cross(x, text); x += MLP(x)."""

    sites = ("attn", "cross", "mlp")
    stages = ("modulated_in", "ff_hidden")
    row_sites = ("mlp",)

    def whole(self, streams: Streams, context: Context, given: Mapping[str, Any]) -> Streams:
        skip = {"skip": given["skip"]["image"]} if "skip" in given else {}
        return streams.updated(image=self.inner(streams["image"], **context.shared, **skip))

    def inside(self, streams: Streams, context: Context, given: Mapping[str, Any], at: Visit | BareVisit) -> Streams:
        block, told = self.inner, context.shared
        x, rotary = self._joined(streams["image"], given), told["image_rotary_emb"]
        h = at.tap("modulated_in", block.norm1(x, told["temb"]))
        x = x + at.around("attn", lambda h: block.attn1(h, image_rotary_emb=rotary), h)

        def read(h: Tensor) -> Tensor:
            return block.attn2(h, encoder_hidden_states=told["encoder_hidden_states"], image_rotary_emb=rotary)

        x = x + at.around("cross", read, block.norm2(x))
        return streams.updated(image=x + mlp_site(block.ff, block.norm3(x), at))

    def _joined(self, x: Tensor, given: Mapping[str, Any]) -> Tensor:
        if self.inner.skip_linear is None:
            return x
        return self.inner.skip_linear(self.inner.skip_norm(torch.cat([x, given["skip"]["image"]], dim=-1)))

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        if self.inner.skip_linear is not None:
            raise NotImplementedError("what this block reads depends on a long skip")
        return self.inner.norm1(streams["image"], context.shared["temb"])

    def macs(self, layout: Layout) -> dict[str, int]:
        n, block = layout.length(), self.inner
        skip = cost.linear(block.skip_linear, n) if block.skip_linear is not None else 0
        return {
            "attn": attention_macs(block.attn1, n),
            "cross": attention_macs(block.attn2, n, layout.read("text")),
            "mlp": cost.linears(block.ff, n),
            "rest": cost.linears(block.norm1, 1) + skip,
        }


@register("hunyuan-dit", paper="diffusers HunyuanDiT2DModel")
class HunyuanDiT(DiffusersAdapter):
    """Rows [uncond, cond] when guided. Of L blocks, block L/2 + 1 + j reads what left block L/2 - 2 - j."""

    classes = ("HunyuanDiT2DModel",)
    pipelines = {"HunyuanDiTPipeline": Told(by_property)}
    time = DISCRETE_1000
    predicts = "v, variance"
    static = ("image_rotary_emb",)
    refuses = {"controlnet_block_samples": CONTROLNET}
    lacks = {"temporal": "HunyuanDiT has no temporal attention"}

    def blocks(self, module: Any) -> list[Block]:
        return [HunyuanDiTBlock(block) for block in module.blocks]

    def skips(self, module: Any) -> Mapping[int, int]:
        half, blocks = module.config.num_layers // 2, len(module.blocks)
        return {half + 1 + j: half - 2 - j for j in range(blocks - half - 1)}

    def embed(self, module: Any, call: Call) -> tuple[Streams, Context]:
        x, p, t5 = call["hidden_states"], module.pos_embed.patch_size, call["encoder_hidden_states_t5"]
        tokens = module.pos_embed(x)
        time = call["timestep"]
        temb = module.time_extra_emb(time, t5, call["image_meta_size"], call["style"], hidden_dtype=time.dtype)
        text = torch.cat(
            [call["encoder_hidden_states"], module.text_embedder(t5.flatten(0, 1)).unflatten(0, t5.shape[:2])], 1
        )
        mask = torch.cat([call["text_embedding_mask"], call["text_embedding_mask_t5"]], dim=-1)[..., None].bool()
        told = {
            "temb": temb,
            "encoder_hidden_states": torch.where(mask, text, module.text_embedding_padding),
            "image_rotary_emb": call["image_rotary_emb"],
        }
        reads = (("text", text.shape[1]), ("t5", t5.shape[1]))
        layout = Layout((Span("image", tokens.shape[1]),), (x.shape[-2] // p, x.shape[-1] // p), reads)
        return Streams({"image": tokens}, layout), Context(time=temb, shared=told)

    def head(self, module: Any, streams: Streams, context: Context) -> Tensor:
        assert context.time is not None
        x = module.norm_out(streams["image"], context.time.to(torch.float32))
        return unpatchify(module.proj_out(x), module.pos_embed.patch_size, streams.layout.grid)

    def layout(self, module: Any) -> Layout:
        return Layout((Span("image", 16),), (4, 4), (("text", 8), ("t5", 4)))

    def end_macs(self, module: Any, layout: Layout) -> dict[str, int]:
        n, t5, time = layout.length(), layout.read("t5"), module.time_extra_emb
        pool, keys = time.pooler, t5 + 1
        embed = patch_macs(module.pos_embed, n) + cost.linears(module.text_embedder, t5)
        embed += cost.linears(time.timestep_embedder, 1) + cost.linears(time.extra_embedder, 1)
        embed += cost.linear(pool.q_proj, 1) + cost.linear(pool.k_proj, keys) + cost.linear(pool.v_proj, keys)
        embed += cost.linear(pool.c_proj, 1) + cost.attention(1, keys, pool.q_proj.out_features)
        return {"embed": embed, "head": cost.linears(module.norm_out, 1) + cost.linear(module.proj_out, n)}
