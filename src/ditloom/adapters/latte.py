"""Latte in diffusers (LatteTransformer3DModel): blocks over the tokens of a frame and blocks over time, in turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ditloom.adapters.basic_block import BasicBlock
from ditloom.adapters.call import Call
from ditloom.adapters.diffusers import DiffusersAdapter, patch_macs
from ditloom.adapters.foreign_block import attention_macs
from ditloom.adapters.guidance import Told, by_scale
from ditloom.contracts.backbone import Block
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Span
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Streams
from ditloom.contracts.time import DISCRETE_1000
from ditloom.parts import cost
from ditloom.parts.patches import unpatchify
from ditloom.sites.visit import BareVisit, Visit, take_rows


def frames_apart(x: Tensor, layout: Layout) -> Tensor:
    """[B, F N, D] to [B F, N, D]."""
    return x.reshape(len(x) * layout.grid[0], -1, x.shape[-1])


def frames_together(x: Tensor, layout: Layout) -> Tensor:
    """The inverse of `frames_apart`."""
    return x.reshape(len(x) // layout.grid[0], -1, x.shape[-1])


def places_apart(x: Tensor, layout: Layout) -> Tensor:
    """[B, F N, D] to [B N, F, D]: one sequence over time for every place of a frame."""
    frames = layout.grid[0]
    return x.reshape(len(x), frames, -1, x.shape[-1]).permute(0, 2, 1, 3).reshape(-1, frames, x.shape[-1])


def places_together(x: Tensor, layout: Layout) -> Tensor:
    """The inverse of `places_apart`."""
    frames, height, width = layout.grid
    x = x.reshape(-1, height * width, frames, x.shape[-1])
    return x.permute(0, 2, 1, 3).reshape(len(x), -1, x.shape[-1])


class SpatialBlock(BasicBlock):
    """Attention among the tokens of every frame, then to the text. Tokens stay [B, F N, D] between blocks."""

    stages = ("modulated_in",)
    kind = "spatial"

    def apart(self, x: Tensor, layout: Layout) -> Tensor:
        """Tokens as the foreign block takes them."""
        return frames_apart(x, layout)

    def together(self, x: Tensor, layout: Layout) -> Tensor:
        """The inverse."""
        return frames_together(x, layout)

    def whole(self, streams: Streams, context: Context, given: Mapping[str, Any]) -> Streams:
        x = self.apart(self.entered(streams, context), streams.layout)
        return streams.updated(image=self.together(self.inner(x, **context.shared[self.kind]), streams.layout))

    def attend(self, h: Tensor, told: Mapping[str, Any], layout: Layout, extra: Mapping[str, Any]) -> Tensor:
        return self.together(self.inner.attn1(self.apart(h, layout)), layout)

    def read(self, x: Tensor, told: Mapping[str, Any], layout: Layout, extra: Mapping[str, Any]) -> Tensor:
        text, mask = told["spatial"]["encoder_hidden_states"], told["spatial"]["encoder_attention_mask"]
        out = self.inner.attn2(self.apart(x, layout), encoder_hidden_states=text, attention_mask=mask)
        return self.together(out, layout)

    def mlp(self, h: Tensor, layout: Layout, at: Visit | BareVisit) -> Tensor:
        run = lambda h: self.together(self.inner.ff(self.apart(h, layout)), layout)  # noqa: E731
        return at.around("mlp", run, h, rows=lambda index: self.inner.ff(take_rows(h, index)))

    def macs(self, layout: Layout) -> dict[str, int]:
        frames, height, width = layout.grid
        n, block = height * width, self.inner
        return {
            "attn": frames * attention_macs(block.attn1, n),
            "cross": frames * attention_macs(block.attn2, n, layout.read("text")),
            "mlp": cost.linears(block.ff, frames * n),
            "rest": 0,
        }


class TemporalBlock(SpatialBlock):
    """Attention over time at every place. The first one adds the positions in time."""

    sites = ("temporal", "mlp")
    attention = "temporal"
    kind = "temporal"

    def __init__(self, inner: Any, first: bool):
        super().__init__(inner)
        self.first = first

    def apart(self, x: Tensor, layout: Layout) -> Tensor:
        return places_apart(x, layout)

    def together(self, x: Tensor, layout: Layout) -> Tensor:
        return places_together(x, layout)

    def entered(self, streams: Streams, context: Context) -> Tensor:
        x, layout = streams["image"], streams.layout
        if not self.first or layout.grid[0] == 1:
            return x
        return self.together(self.apart(x, layout) + context.shared["positions"].to(x.dtype), layout)

    def macs(self, layout: Layout) -> dict[str, int]:
        frames, height, width = layout.grid
        n, block = height * width, self.inner
        return {
            "temporal": n * attention_macs(block.attn1, frames),
            "mlp": cost.linears(block.ff, frames * n),
            "rest": 0,
        }


@register("latte", paper="diffusers LatteTransformer3DModel")
class Latte(DiffusersAdapter):
    """Rows [uncond, cond] when guided. Blocks count in pairs: spatial 0, 2, ..., temporal 1, 3, ..."""

    classes = ("LatteTransformer3DModel",)
    pipelines = {"LattePipeline": Told(by_scale)}
    time = DISCRETE_1000
    predicts = "eps, variance"
    lacks = {"skip": "Latte has no long skips"}

    def blocks(self, module: Any) -> list[Block]:
        pairs = zip(module.transformer_blocks, module.temporal_transformer_blocks, strict=True)
        return [b for i, (s, t) in enumerate(pairs) for b in (SpatialBlock(s), TemporalBlock(t, i == 0))]

    def check(self, values: Mapping[str, Any]) -> None:
        super().check(values)
        if values.get("enable_temporal_attentions") is False:
            raise UserError("methods cannot act on a call without temporal attention: half of the blocks do not run")

    def embed(self, module: Any, call: Call) -> tuple[Streams, Context]:
        x, p = call["hidden_states"], module.config.patch_size
        batch, _, frames, height, width = x.shape
        layout_grid = (frames, height // p, width // p)
        tokens = module.pos_embed(x.permute(0, 2, 1, 3, 4).flatten(0, 1))
        time, embedded = module.adaln_single(
            call["timestep"],
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            batch_size=batch,
            hidden_dtype=tokens.dtype,
        )
        text = module.caption_projection(call["encoder_hidden_states"])
        n = tokens.shape[1]
        spatial = {
            "encoder_hidden_states": text.repeat_interleave(frames, dim=0),
            "encoder_attention_mask": call["encoder_attention_mask"],
            "timestep": time.repeat_interleave(frames, dim=0),
        }
        shared = {
            "timestep": time,
            "spatial": spatial,
            "temporal": {"timestep": time.repeat_interleave(n, dim=0)},
            "positions": module.temp_pos_embed,
        }
        layout = Layout((Span("image", frames * n),), layout_grid, (("text", text.shape[1]),))
        return Streams({"image": frames_together(tokens, layout)}, layout), Context(time=embedded, shared=shared)

    def head(self, module: Any, streams: Streams, context: Context) -> Tensor:
        assert context.time is not None
        layout, time = streams.layout, context.time
        frames, *grid = layout.grid
        shift, scale = (module.scale_shift_table[None] + time.repeat_interleave(frames, 0)[:, None]).chunk(2, dim=1)
        x = module.norm_out(frames_apart(streams["image"], layout)) * (1 + scale) + shift
        pictures = unpatchify(module.proj_out(x), module.config.patch_size, tuple(grid))
        return pictures.unflatten(0, (-1, frames)).permute(0, 2, 1, 3, 4)

    def layout(self, module: Any) -> Layout:
        return Layout((Span("image", 32),), (2, 4, 4), (("text", 8),))

    def end_macs(self, module: Any, layout: Layout) -> dict[str, int]:
        n = layout.length()
        embed = patch_macs(module.pos_embed, n) + cost.linears(module.adaln_single, 1)
        embed += cost.linears(module.caption_projection, layout.read("text"))
        return {"embed": embed, "head": cost.linear(module.proj_out, n)}
