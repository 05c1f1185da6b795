"""DyDiT: Dynamic Diffusion Transformer (Zhao et al., ICLR 2025, arXiv 2410.03456; DyDiT++, arXiv 2504.06803).

From the time alone a router switches heads and hidden groups of the MLP off; from a token's features another decides
whether it passes the MLP. Width depends on t alone, so the weights of a step can be cut out before it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditloom.backbones import dit
from ditloom.backbones.dit import DiT, DiTBlock, DiTConfig, settings_of
from ditloom.contracts.backbone import NOTHING, Backbone, Block
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.parts import attention, cost
from ditloom.parts.attention import SelfAttention
from ditloom.parts.feed_forward import MLP
from ditloom.parts.norms import modulate
from ditloom.parts.routers import TokenRouter, WidthRouter, cost_ratio, gumbel_difference
from ditloom.parts.slicing import sliced_attention, sliced_mlp
from ditloom.sites.visit import BARE, BareVisit, Visit, take_rows, visit

NOISE = "router_noise"
MASKS = ("head_mask", "group_mask", "token_mask")


@dataclass(frozen=True, kw_only=True)
class DyDiTConfig(DiTConfig):
    """Settings of a DyDiT: those of a DiT. The MLP's hidden features fall into as many groups as there are heads."""

    family: ClassVar[str] = "dydit"

    def __post_init__(self) -> None:
        if int(self.width * self.mlp_ratio) % self.heads:
            raise UserError(
                f"DyDiT splits the MLP's {int(self.width * self.mlp_ratio)} hidden features into {self.heads} groups, "
                "one per head: that does not divide"
            )

    def build(self) -> DyDiT:
        return DyDiT(self)


class MaskedAttention(SelfAttention):
    """Softmax attention whose heads are multiplied by a mask [B, 1, H] before the projection."""

    def masked(self, x: Tensor, mask: Tensor, layout: Layout, context: Context, at: Visit | BareVisit) -> Tensor:
        q, k, v = self.heads_of(x, context.rotary.get("image"), at)
        heads = at.tap("attn_heads", attention.attend(q, k, v, layout, context.rule, context.gates, at))
        return at.tap("attn_out", self.proj(spread(mask, heads.shape[-1]) * heads))


class MaskedMLP(MLP):
    """An MLP whose hidden groups are multiplied by a mask [B, 1, G]; GELU(0) = 0."""

    def masked(self, x: Tensor, mask: Tensor, at: Visit | BareVisit = BARE) -> Tensor:
        hidden = self.fc1(x)
        hidden = nn.functional.gelu(spread(mask, hidden.shape[-1]) * hidden, approximate=self.approximate)
        return self.fc2(at.tap("ff_hidden", hidden))


def spread(mask: Tensor, width: int) -> Tensor:
    """A mask of groups [B, 1, G] over all features [B, 1, width]."""
    return mask.repeat_interleave(width // mask.shape[-1], dim=-1)


class DyDiTBlock(DiTBlock):
    """x += g1 Attn(mod(LN x); heads); x += tokens * g2 MLP(mod(LN x); groups), the masks from routers.

    All is computed and multiplied by masks of 0 and 1, which are stages: capture them for the loss on the cost.
    given["router_noise"] [B, 2 (H - 1) + N]: what training adds to the logits of heads, groups and tokens.
    """

    attn: MaskedAttention
    mlp: MaskedMLP

    def __init__(self, width: int, heads: int, mlp_ratio: float, norms: tuple[nn.Module, nn.Module]):
        parts = {"attn": MaskedAttention(width, heads), "mlp": MaskedMLP(width, int(width * mlp_ratio))}
        super().__init__(width, heads, norms=norms, **parts)  # type: ignore[arg-type]
        self.head_router, self.group_router = WidthRouter(width, heads), WidthRouter(width, heads)
        self.token_router = TokenRouter(width)
        self.stages = (*self.stages, *MASKS)

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        x, layout = streams["image"], streams.layout
        at = visit(plan, given, layout)
        chunks = (context.spread(m, layout) for m in self.modulation(context.modulation["image"]))
        shift1, scale1, gate1, shift2, scale2, gate2 = chunks
        noise = self.noises(given)
        assert context.time is not None
        heads = at.tap("head_mask", self.head_router(context.time, noise[0]))
        groups = at.tap("group_mask", self.group_router(context.time, noise[1]))

        h = at.tap("modulated_in", modulate(self.norm1(x), shift1, scale1))
        x = torch.addcmul(x, gate1, at.around("attn", lambda h: self.attn.masked(h, heads, layout, context, at), h))
        tokens = at.tap("token_mask", self.token_router(x, noise[2]))
        h = modulate(self.norm2(x), shift2, scale2)
        mlp_rows = lambda index: self.mlp.masked(take_rows(h, index), groups)  # noqa: E731
        y = at.around("mlp", lambda h: self.mlp.masked(h, groups, at), h, rows=mlp_rows)
        return streams.updated(image=torch.addcmul(x, gate2, tokens * y)), at.kept

    def noises(self, given: Mapping[str, Any]) -> Sequence[Tensor | None]:
        """The noise of heads, groups and tokens; none outside training."""
        if NOISE not in given:
            return (None, None, None)
        free, noise = self.attn.heads - 1, given[NOISE]
        return noise.split([free, free, noise.shape[1] - 2 * free], dim=1)

    def macs(self, layout: Layout) -> dict[str, int]:
        costs = super().macs(layout)
        routers = cost.linears(self.head_router, 1) + cost.linears(self.group_router, 1)
        return {**costs, "rest": costs["rest"] + routers + cost.linears(self.token_router, layout.length())}

    def modulated_in_macs(self, layout: Layout) -> int:
        return self.modulation.macs(len(layout.groups("image")))

    def sliced(self, time: Tensor) -> SlicedDyDiTBlock:
        """The block at one time, [1, D] its embedding: with the heads and groups that are on, and no others."""
        heads, groups = (router(time)[0, 0].bool() for router in (self.head_router, self.group_router))
        return SlicedDyDiTBlock(self, sliced_attention(self.attn, heads), sliced_mlp(self.mlp, groups))


class SlicedDyDiTBlock(DiTBlock):
    """A DyDiT block of one time, for inference: narrower, and the MLP runs on the chosen tokens alone."""

    def __init__(self, block: DyDiTBlock, attn: SelfAttention, mlp: MLP):
        with torch.device("meta"):
            super().__init__(attn.qkv.in_features, 1, attn=attn, mlp=mlp, modulation=block.modulation)
        self.norm1, self.norm2, self.token_router = block.norm1, block.norm2, block.token_router

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        x, layout = streams["image"], streams.layout
        at = visit(plan, given, layout)
        chunks = (context.spread(m, layout) for m in self.modulation(context.modulation["image"]))
        shift1, scale1, gate1, shift2, scale2, gate2 = chunks
        h = at.tap("modulated_in", modulate(self.norm1(x), shift1, scale1))
        x = torch.addcmul(x, gate1, at.around("attn", lambda h: self.attn(h, layout, context, at), h))
        chosen = self.token_router(x)[..., 0].bool()
        h = modulate(self.norm2(x), shift2, scale2)

        def gathered(h: Tensor) -> Tensor:
            out = torch.zeros_like(h)
            out[chosen] = self.mlp(h[chosen])
            return out

        return streams.updated(image=torch.addcmul(x, gate2, at.around("mlp", gathered, h))), at.kept

    def macs(self, layout: Layout) -> dict[str, int]:
        """With every token on: how many are depends on the image."""
        costs = super().macs(layout)
        return {**costs, "rest": costs["rest"] + cost.linears(self.token_router, layout.length())}


@register("dydit", paper="Dynamic Diffusion Transformer, arXiv 2410.03456; DyDiT++, arXiv 2504.06803")
class DyDiT(DiT):
    """A DiT with a router in front of its heads, of its hidden groups and of its MLP's tokens.

    x [B, C, H, W] with H, W multiples of the patch; prediction [B, C or 2C, H, W]. In training the condition carries
    the routers' noise, `Condition(extra={"router_noise": ...})`, as `noise` draws it; without it masks are what
    inference has, with gradients all the same.
    """

    missing: ClassVar[Mapping[str, str]] = {kind: why.replace("DiT", "DyDiT") for kind, why in DiT.missing.items()}
    preset: DyDiTConfig

    def make_block(self, layer: int) -> Block:
        c = self.preset
        if c.attention != "softmax":
            raise UserError(f"DyDiT masks the heads of softmax attention; got the kind {c.attention!r}")
        return DyDiTBlock(c.width, c.heads, c.mlp_ratio, self.make_norms())

    def initialise(self) -> None:
        """As DiT, with every router open: it starts as the DiT of its weights."""
        super().initialise()
        for module in self.modules():
            if isinstance(module, WidthRouter | TokenRouter):
                module.open_()

    def grown_from(self, other: Backbone) -> Mapping[str, Tensor]:
        """The weights of a DiT with this network's own routers; those of a DyDiT as they are."""
        return other.state_dict() if isinstance(other, DyDiT) else self.with_routers(other.state_dict())

    def with_routers(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A DiT's weights and this network's routers."""
        return {**state, **{name: value for name, value in self.state_dict().items() if "_router." in name}}

    def noise(self, batch: int, tokens: int, generator: torch.Generator | None = None) -> Tensor:
        """What training adds to the routers' logits [B, L, 2 (H - 1) + N]."""
        c = self.preset
        return gumbel_difference((batch, c.depth, 2 * (c.heads - 1) + tokens), generator)

    def prepare(self, condition: Condition) -> Memory:
        memory = super().prepare(condition)
        return replace(memory, extra={NOISE: condition.extra[NOISE]}) if NOISE in condition.extra else memory

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        if time.ndim != 1:
            raise UserError("DyDiT chooses its width by the time of the image: one time per image, not per token")
        streams, context = super().embed(x, time, memory, segments)
        if NOISE not in memory.extra:
            return streams, context
        noise, c = memory.extra[NOISE], self.preset
        expected = (x.shape[0], c.depth, 2 * (c.heads - 1) + streams.layout.length())
        if noise.shape != expected:
            raise UserError(f"the routers' noise is of shape {list(expected)} here; got {list(noise.shape)}")
        return streams, replace(context, shared={**context.shared, NOISE: noise})

    def handed(self, position: int, context: Context) -> Mapping[str, Any]:
        return {NOISE: context.shared[NOISE][:, position]} if NOISE in context.shared else NOTHING

    def executed(self, masks: Sequence[Mapping[str, Tensor]], layout: Layout) -> Tensor:
        """The share of the blocks' cost that masks leave, per row [B]; with gradients, for `routers.cost_loss`.

        masks: per block its captured head_mask [B, 1, H], group_mask [B, 1, H] and token_mask [B, N, 1].
        """
        parts: list[tuple[float, Tensor]] = []
        for block, mask in zip(self.blocks, masks, strict=True):
            assert isinstance(block, DyDiTBlock)
            costs = block.macs(layout)
            heads, groups, tokens = (mask[name].mean((1, 2)) for name in MASKS)
            parts += [(costs["attn"], heads), (costs["mlp"], groups * tokens)]
        return cost_ratio(parts)

    @torch.no_grad()
    def sliced(self, t: float) -> DiT:
        """The network of one noise level, for inference: the same weights without what the routers switch off."""
        time = self.t_embedder(self.preset.time.native(torch.tensor([t], dtype=torch.float64, device=self.device)))
        return self._with_blocks([block.sliced(time) for block in self.blocks])  # type: ignore[operator,union-attr]

    def complete(self) -> DiT:
        """The plain DiT inside, sharing all its parameters: what the first stage of training trains beside."""
        blocks = []
        for block in self.blocks:
            assert isinstance(block, DyDiTBlock)
            parts: dict[str, Any] = {"attn": block.attn, "mlp": block.mlp, "modulation": block.modulation}
            blocks.append(DiTBlock(self.preset.width, self.preset.heads, norms=(block.norm1, block.norm2), **parts))
        return self._with_blocks(blocks)

    def _with_blocks(self, blocks: Sequence[Block]) -> DiT:
        shared = {f.name: getattr(self.preset, f.name) for f in fields(self.preset)}
        with torch.device("meta"):
            network = DiT(DiTConfig(**{**shared, "depth": 1}))
        network.preset = DiTConfig(**shared)
        for name in ("x_embedder", "t_embedder", "y_embedder", "final_layer"):
            setattr(network, name, getattr(self, name))
        network.blocks = nn.ModuleList(blocks)
        return network.train(self.training)


def from_dit(config: DiTConfig, state: Mapping[str, Tensor]) -> DyDiT:
    """A DyDiT with the weights of a DiT (its state dict) and open routers: it computes exactly what that computed."""
    backbone = DyDiT(DyDiTConfig(**settings_of(config, "DyDiT")))
    backbone.load_state_dict(dict(backbone.with_routers(state)), strict=True)
    return backbone


PRESETS = {
    f"DyDiT-{size}/2": DyDiTConfig(depth=depth, width=width, heads=heads)
    for size, (depth, width, heads) in dit.SIZES.items()
}
