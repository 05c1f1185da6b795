"""Skip-DiT: Accelerating Vision Diffusion Transformers with Skip Branches (Chen et al., ICCV 2025, arXiv 2411.17616).

A DiT whose first half hands its outputs to the second, last in, first out. Deep features then change little from step
to step, and Skip-Cache runs only the outermost blocks while the rest is kept: the range from block k to block L - k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ditloom.backbones import dit
from ditloom.backbones.dit import DiT, DiTBlock, DiTConfig, settings_of
from ditloom.contracts.backbone import NOTHING, Backbone, Block
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Streams
from ditloom.parts.long_skip import ResidualSkipMerge, SkipMerge
from ditloom.parts.patches import zero_


@dataclass(frozen=True, kw_only=True)
class SkipDiTConfig(DiTConfig):
    """Settings of a Skip-DiT: those of a DiT of even depth.

    residual: x + linear(LN([x, skip])) with a zero linear at the start, so that a DiT's weights compute what they did;
    the released form is linear(LN([x, skip])) with random weights, which a trained DiT does not survive untrained.
    """

    family: ClassVar[str] = "skip-dit"

    residual: bool = False

    def __post_init__(self) -> None:
        if self.depth % 2:
            raise UserError(f"the depth of a Skip-DiT is even: every block has a partner; got {self.depth}")

    def build(self) -> SkipDiT:
        return SkipDiT(self)


class SkipDiTBlock(DiTBlock):
    """A DiT block after x = merge(x, skip), with the skip in given["skip"]."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, merge: SkipMerge, **more: Any):
        super().__init__(width, heads, mlp_ratio, **more)
        self.merge = merge

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        merged = self.merge(streams["image"], given["skip"]["image"])
        return super().forward(streams.updated(image=merged), context, plan, given)

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        raise UserError("the input of this Skip-DiT block depends on its long skip: probe a block of the first half")

    def macs(self, layout: Layout) -> dict[str, int]:
        costs = super().macs(layout)
        return {**costs, "rest": costs["rest"] + self.merge.macs(layout.length())}


@register("skip-dit", paper="Accelerating Vision Diffusion Transformers with Skip Branches, arXiv 2411.17616")
class SkipDiT(DiT):
    """A DiT with a long skip from block l to block L - 1 - l, for every l < L / 2.

    x [B, C, H, W] with H, W multiples of the patch; prediction [B, C or 2C, H, W].
    """

    missing: ClassVar[Mapping[str, str]] = {
        kind: reason.replace("DiT", "Skip-DiT") for kind, reason in DiT.missing.items() if kind != "skip"
    }
    preset: SkipDiTConfig

    def __init__(self, config: SkipDiTConfig):
        super().__init__(config)
        self.skips = {config.depth - 1 - source: source for source in range(config.depth // 2)}

    def make_block(self, layer: int) -> Block:
        c = self.preset
        if layer < c.depth // 2:
            return super().make_block(layer)
        merge = ResidualSkipMerge(c.width) if c.residual else SkipMerge(c.width)
        parts = {"norms": self.make_norms(), "attn": self.make_attention(layer)}
        return SkipDiTBlock(c.width, c.heads, c.mlp_ratio, merge, **parts)

    def initialise(self) -> None:
        """As DiT, except that the merges keep torch's defaults (they are made after the initialiser, as published)."""
        super().initialise()
        for block in self.blocks:
            if isinstance(block, SkipDiTBlock):
                block.merge.linear.reset_parameters()
                if self.preset.residual:
                    zero_(block.merge.linear)

    def grown_from(self, other: Backbone) -> Mapping[str, Tensor]:
        """The weights of a DiT with this network's own new merges; those of a Skip-DiT as they are."""
        return other.state_dict() if isinstance(other, SkipDiT) else self.with_merges(other.state_dict())

    def with_merges(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A DiT's weights and this network's merges."""
        return {**state, **{name: value for name, value in self.state_dict().items() if ".merge." in name}}


def from_dit(config: DiTConfig, state: Mapping[str, Tensor], residual: bool = True) -> SkipDiT:
    """A Skip-DiT with the weights of a DiT (its state dict) and new merges.

    With `residual` it computes exactly what the DiT computed, until it is trained; in the released form it has to be
    trained first (new parts alone, then everything, is how the authors do it for video).
    """
    backbone = SkipDiT(SkipDiTConfig(**settings_of(config, "Skip-DiT"), residual=residual))
    backbone.load_state_dict(dict(backbone.with_merges(state)), strict=True)
    return backbone


PRESETS = {
    f"Skip-{name}": SkipDiTConfig(depth=c.depth, width=c.width, heads=c.heads, patch=c.patch)
    for name, c in dit.PRESETS.items()
    if c.patch == 2
}
