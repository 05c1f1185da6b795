"""DiT-MoE: Scaling Diffusion Transformers to 16 Billion Parameters (Fei et al., 2024, arXiv 2407.11633).

A DiT whose feed-forwards are sparse: two of E experts per token, and a shared expert that every token runs through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ditloom.backbones.dit import SIZES as DIT_SIZES
from ditloom.backbones.dit import DiT, DiTBlock, DiTConfig
from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Streams
from ditloom.contracts.time import DISCRETE_1000, FLOW
from ditloom.parts.experts import BALANCE, MoE, Router, SwiGLUExperts
from ditloom.parts.feed_forward import SwiGLU


@dataclass(frozen=True, kw_only=True)
class DiTMoEConfig(DiTConfig):
    """Settings of a DiT-MoE.

    experts, top_k: routed experts of hidden width mlp_ratio * width, and how many of them a token runs through.
    shared_experts: the shared expert's hidden width in multiples of the width. qk_norm: a LayerNorm of queries and keys
    per head, as in the released XL and G. flow: trained as a rectified flow; of 2C outputs the second half is dropped.
    """

    family: ClassVar[str] = "dit-moe"

    experts: int = 8
    top_k: int = 2
    shared_experts: int = 2
    qk_norm: bool = False
    flow: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise UserError(f"{self.top_k} experts per token cannot be chosen among {self.experts}")

    @property
    def process(self) -> Mapping[str, Any]:  # type: ignore[override]
        """What the released weights were trained for: S and B are diffusion models, XL and G rectified flows."""
        return {"name": "linear", "predicts": "v"} if self.flow else DiTConfig.process

    @property
    def out_channels(self) -> int:
        return 2 * self.channels if self.flow else super().out_channels

    def build(self) -> DiTMoE:
        return DiTMoE(self)


class DiTMoEBlock(DiTBlock):
    """A DiT block whose site "mlp" is a mixture of experts."""

    auxiliary = (BALANCE,)


def sparse_swiglu(width: int, hidden: int, experts: int, top_k: int, shared: int) -> MoE:
    """E routed SwiGLU experts of width `hidden` and a shared one of width `shared`, none with biases."""
    return MoE(Router(width, experts, top_k), SwiGLUExperts(experts, width, hidden), SwiGLU(width, shared, bias=False))


def xavier_halves_(mlp: SwiGLU) -> None:
    """Xavier-uniform for each of the two matrices that stand one above the other."""
    for half in mlp.w12.weight.data.chunk(2):
        nn.init.xavier_uniform_(half)


@register("dit-moe", paper="Scaling Diffusion Transformers to 16 Billion Parameters, arXiv 2407.11633")
class DiTMoE(DiT):
    """DiT with sparse experts. x [B, C, H, W]; prediction [B, C or 2C, H, W], of a rectified flow C."""

    missing: ClassVar[Mapping[str, str]] = {
        kind: reason.replace("DiT", "DiT-MoE") for kind, reason in DiT.missing.items()
    }
    preset: DiTMoEConfig

    def make_block(self, layer: int) -> DiTBlock:
        c = self.preset
        hidden, shared = int(c.width * c.mlp_ratio), c.shared_experts * c.width
        moe: Any = sparse_swiglu(c.width, hidden, c.experts, c.top_k, shared)
        return DiTMoEBlock(c.width, c.heads, qk_norm="layer" if c.qk_norm else None, mlp=moe)

    def initialise(self) -> None:
        super().initialise()
        for moe in (m for m in self.modules() if isinstance(m, MoE)):
            xavier_halves_(moe.shared)

    def head(self, streams: Streams, context: Context) -> Tensor:
        prediction = super().head(streams, context)
        return prediction[:, : self.preset.channels] if self.preset.flow else prediction


SIZES = {**DIT_SIZES, "G": (40, 1408, 16)}
RELEASED = (("S", 8), ("S", 16), ("B", 8), ("XL", 8), ("G", 16))


def _released(size: str, experts: int) -> DiTMoEConfig:
    depth, width, heads = SIZES[size]
    large = size in ("XL", "G")
    time = FLOW if large else DISCRETE_1000
    return DiTMoEConfig(depth=depth, width=width, heads=heads, experts=experts, qk_norm=large, flow=large, time=time)


PRESETS = {f"DiT-MoE-{size}/2-{experts}E2A": _released(size, experts) for size, experts in RELEASED}
