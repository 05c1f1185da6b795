"""DiT in diffusers (DiTTransformer2DModel): class labels and time by adaLN-Zero in every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ditloom.adapters.basic_block import BasicBlock, Modulated
from ditloom.adapters.call import Call
from ditloom.adapters.diffusers import DiffusersAdapter, patch_macs
from ditloom.adapters.guidance import Heard, Told
from ditloom.contracts.backbone import Block
from ditloom.contracts.layout import Layout, Span
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Streams
from ditloom.contracts.time import DISCRETE_1000
from ditloom.parts import cost
from ditloom.parts.patches import unpatchify


def by_null_class(pipe: Any, values: Mapping[str, Any], heard: Heard) -> bool:
    """DiTPipeline tells by its labels: guided, the second half of the rows is of the class that stands for none."""
    labels = values["class_labels"]
    half = labels[len(labels) // 2 :]
    return len(labels) > 1 and bool((half == pipe.transformer.config.num_embeds_ada_norm).all())


class DiTBlock(BasicBlock):
    """adaLN-Zero: every block embeds time and class for itself."""

    def modulated(self, x: Tensor, told: Mapping[str, Any]) -> Modulated:
        h, *rest = self.inner.norm1(x, told["timestep"], told["class_labels"], hidden_dtype=x.dtype)
        return Modulated(h, *(vector[:, None] for vector in rest))

    def norm_mlp(self, x: Tensor) -> Tensor:
        return self.inner.norm3(x)


@register("dit", paper="diffusers DiTTransformer2DModel")
class DiT(DiffusersAdapter):
    """Rows [cond, null] when guided. `context.time` is the embedding of time and class, which the head reads too."""

    classes = ("DiTTransformer2DModel",)
    pipelines = {"DiTPipeline": Told(by_null_class, ("cond", "uncond"))}
    time = DISCRETE_1000
    predicts = "eps, variance"
    lacks = {
        "cross": "DiT is conditioned through adaLN and has no cross-attention",
        "skip": "DiT has no long skips",
        "temporal": "DiT has no temporal attention",
    }

    def blocks(self, module: Any) -> list[Block]:
        return [DiTBlock(block) for block in module.transformer_blocks]

    def embed(self, module: Any, call: Call) -> tuple[Streams, Context]:
        x, p = call["hidden_states"], module.patch_size
        grid = (x.shape[-2] // p, x.shape[-1] // p)
        tokens = module.pos_embed(x)
        told = {name: call[name] for name in ("timestep", "class_labels", "cross_attention_kwargs")}
        time = module.transformer_blocks[0].norm1.emb(told["timestep"], told["class_labels"], hidden_dtype=tokens.dtype)
        return Streams({"image": tokens}, Layout((Span("image", tokens.shape[1]),), grid)), Context(
            time=time, shared=told
        )

    def head(self, module: Any, streams: Streams, context: Context) -> Tensor:
        assert context.time is not None
        shift, scale = module.proj_out_1(F.silu(context.time)).chunk(2, dim=1)
        x = module.norm_out(streams["image"]) * (1 + scale[:, None]) + shift[:, None]
        return unpatchify(module.proj_out_2(x), module.patch_size, streams.layout.grid)

    def end_macs(self, module: Any, layout: Layout) -> dict[str, int]:
        n = layout.length()
        head = cost.linear(module.proj_out_1, 1) + cost.linear(module.proj_out_2, n)
        time = cost.linears(module.transformer_blocks[0].norm1.emb, 1)
        return {"embed": patch_macs(module.pos_embed, n) + time, "head": head}
