"""Dense2MoE: Restructuring Diffusion Transformer to MoE for Efficient Text-to-Image Generation (Zheng et al., 2025).

arXiv 2510.09094. A FLUX whose feed-forwards are cut into experts, a part of the hidden units always active (the shared
expert) and the rest in small experts of which a token runs through two; and whose blocks form groups, of which a router
lets every image run through some and skip the others (mixture of blocks).

No code was released. That 37.5 % of the hidden units stay active, and the count of 5.2B, are the paper's; the numbers
of experts, which blocks form groups and how gates are scaled are a reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ditloom.backbones.flux import Flux, FluxConfig, FluxSingleBlock
from ditloom.backbones.mmdit import MMDiTBlock
from ditloom.contracts.backbone import NOTHING, Block
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.parts.experts import BALANCE, GELUExperts, MoE, Router, shares
from ditloom.parts.feed_forward import MLP
from ditloom.sites.visit import visit

RUNS, GATE = "runs", "gate"
BLOCK_BALANCE = "block_balance"


@dataclass(frozen=True, kw_only=True)
class Dense2MoEConfig(FluxConfig):
    """Settings of a Dense2MoE.

    shared: one part in how many of the hidden units is the shared expert. experts, top_k: the others, in how many
    experts, and how many of them a token runs through. groups: the first block of every group of `group` blocks
    (transitions not counted), of which an image runs through `active`.
    """

    family: ClassVar[str] = "dense2moe"

    shared: int = 4
    experts: int = 12
    top_k: int = 2
    groups: tuple[int, ...] = ()
    group: int = 4
    active: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k <= self.experts:
            raise UserError(f"{self.top_k} experts per token cannot be chosen among {self.experts}")
        if self.hidden % self.shared or (self.hidden - self.hidden // self.shared) % self.experts:
            raise UserError(
                f"{self.hidden} hidden units cannot be cut into a shared expert of one in {self.shared} "
                f"and {self.experts} equal experts"
            )
        if not 1 <= self.active <= self.group:
            raise UserError(f"{self.active} blocks cannot be chosen in a group of {self.group}")
        _check_groups(self)

    @property
    def hidden(self) -> int:
        """Hidden units of a feed-forward before it is cut."""
        return int(self.width * self.mlp_ratio)

    def place(self, index: int) -> tuple[int, int] | None:
        """(group, rank in it) of a block; None for one that always runs."""
        return next(
            ((g, index - start) for g, start in enumerate(self.groups) if 0 <= index - start < self.group), None
        )

    def build(self) -> Dense2MoE:
        return Dense2MoE(self)


def _check_groups(config: Dense2MoEConfig) -> None:
    taken: set[int] = set()
    for start in config.groups:
        members = set(range(start, start + config.group))
        if members & taken:
            raise UserError(f"the groups of {config.group} blocks that begin at {list(config.groups)} overlap")
        kinds = {"double": range(config.depth), "single": range(config.depth, config.depth + config.single_depth)}
        if not any(members <= set(blocks) for blocks in kinds.values()):
            raise UserError(
                f"the group of {config.group} blocks from {start} on is not inside the {config.depth} double or the "
                f"{config.single_depth} single blocks"
            )
        taken |= members


def sparse_gelu(config: Dense2MoEConfig, out_bias: bool) -> MoE:
    """A feed-forward cut into experts; where routing is uniform every chosen expert counts in full."""
    width, shared = config.width, config.hidden // config.shared
    experts = GELUExperts(config.experts, width, (config.hidden - shared) // config.experts)
    router = Router(width, config.experts, config.top_k)
    return MoE(router, experts, MLP(width, shared, out_bias=out_bias), scale=float(config.experts))


class RoutedBlock(Block):
    """A block that only the images run which its group's router sends there; for the others it changes nothing.

    What is handed to it says which: "runs" [B]. The choice is learned straight-through, by the probability in "gate".
    """

    auxiliary = (BALANCE, BLOCK_BALANCE)
    share: tuple[int, int, int] | None = None  # rank in its group, active blocks, blocks

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        out, kept = super().forward(streams, context, plan, given)  # type: ignore[safe-super]
        if RUNS not in given:
            return out, kept
        at = visit(plan, given, streams.layout)
        if at.wants(BLOCK_BALANCE):
            at.keep(BLOCK_BALANCE, given[BLOCK_BALANCE])
        return out.map(lambda y, x: _chosen(y, x, given), streams), {**kept, **at.kept}

    def macs(self, layout: Layout) -> dict[str, int]:
        """Of the share of images that run through it, so that a group's costs add up to those of its active blocks."""
        costs = super().macs(layout)  # type: ignore[safe-super]
        if self.share is None:
            return costs
        rank, active, blocks = self.share
        part = lambda cost: cost * active * (rank + 1) // blocks - cost * active * rank // blocks  # noqa: E731
        return {site: part(cost) for site, cost in costs.items()}


def _chosen(y: Tensor, x: Tensor, given: Mapping[str, Any]) -> Tensor:
    """y for the images that run and x for the others; the gate adds nothing but its gradient."""
    runs, gate = given[RUNS][:, None, None], given[GATE][:, None, None]
    out = torch.where(runs, y, x)
    if torch.is_grad_enabled() and gate.requires_grad:
        out = out + (gate - gate.detach()).to(x.dtype) * runs * (y - x).detach()
    return out


class Dense2MoEDoubleBlock(RoutedBlock, MMDiTBlock):
    """A double block of FLUX with experts in both streams; "balance" is of the image's."""


class Dense2MoESingleBlock(RoutedBlock, FluxSingleBlock):
    """A single block of FLUX with experts beside its attention."""


@register("dense2moe", paper="Dense2MoE, arXiv 2510.09094")
class Dense2MoE(Flux):
    """FLUX with experts in its feed-forwards and blocks that images may skip.

    Outside of training a block that no image of a batch runs is not computed. A plan for a block (a capture, an edit)
    computes it for all of them.
    """

    missing: ClassVar[Mapping[str, str]] = {
        kind: reason.replace("FLUX", "Dense2MoE") for kind, reason in Flux.missing.items()
    }
    preset: Dense2MoEConfig

    def __init__(self, config: Dense2MoEConfig):
        super().__init__(config)
        self.routers = nn.ModuleList(Router(config.width, config.group, config.active) for _ in config.groups)

    def make_double(self, index: int) -> Block:
        c = self.preset
        mlps = {stream: sparse_gelu(c, out_bias=True) for stream in ("image", "text")}
        return self._placed(Dense2MoEDoubleBlock(c.width, c.heads, qk_norm="rms", mlps=mlps), index)

    def make_single(self, index: int) -> Block:
        c = self.preset
        mlp = sparse_gelu(c, out_bias=False)
        return self._placed(Dense2MoESingleBlock(c.width, c.heads, mlp=mlp), c.depth + index)

    def _placed(self, block: RoutedBlock, index: int) -> Block:
        place = self.preset.place(index)
        if place is not None:
            block.share = (place[1], self.preset.active, self.preset.group)
        return block

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        streams, context = super().embed(x, time, memory, segments)
        if not self.routers:
            return streams, context
        assert context.time is not None
        assert memory.vector is not None
        c = (context.time if context.time.ndim == 2 else context.time.mean(1)) + memory.vector
        return streams, replace(context, shared={**context.shared, "groups": [route(c) for route in self.routers]})

    def handed(self, position: int, context: Context) -> Mapping[str, Any]:
        """Which images run through a block of a group, and with what probability."""
        depth = self.preset.depth
        place = self.preset.place(position - (position > depth))
        if self.blocks[position].is_transition or place is None or "groups" not in context.shared:
            return NOTHING
        probabilities, _, chosen = context.shared["groups"][place[0]]
        balance = torch.stack([shares(chosen[:, None], self.preset.group), probabilities], dim=1)
        return {
            RUNS: (chosen == place[1]).any(-1),
            GATE: probabilities[:, place[1]],
            BLOCK_BALANCE: balance,
        }

    def call(
        self, block: nn.Module, streams: Streams, context: Context, plan: BlockPlan | None, given: Mapping[str, Any]
    ) -> tuple[Streams, dict[str, Any]]:
        runs = given.get(RUNS)
        if plan is None and runs is not None and not (torch.is_grad_enabled() or runs.is_meta or bool(runs.any())):
            return streams, {}
        return super().call(block, streams, context, plan, given)

    def end_macs(self, layout: Layout) -> dict[str, int]:
        ends = super().end_macs(layout)
        return {**ends, "embed": ends["embed"] + sum(r.macs(1) for r in cast("Sequence[Router]", self.routers))}


PRESETS = {
    "Dense2MoE-FLUX-experts": Dense2MoEConfig(guidance=3.5),
    "Dense2MoE-FLUX-L": Dense2MoEConfig(guidance=3.5, groups=(4, 8, 12, *range(20, 56, 4))),
}
