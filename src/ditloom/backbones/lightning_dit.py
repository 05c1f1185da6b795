"""LightningDiT: Reconstruction vs. Generation, Taming Optimization Dilemma in Latent Diffusion Models.

Yao et al., CVPR 2025, arXiv 2501.01423. A DiT with parts of language models, each behind a flag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditloom.backbones.dit import DiT, DiTBlock, DiTConfig
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Streams
from ditloom.contracts.time import REVERSED, TimeInput
from ditloom.parts.feed_forward import MLP, SwiGLU
from ditloom.parts.heads import Head
from ditloom.parts.modulation import AdaLN
from ditloom.parts.norms import norm
from ditloom.parts.positions import axial_axes, rotary, rotary_grid
from ditloom.parts.segments import Joined


@dataclass(frozen=True, kw_only=True)
class LightningDiTConfig(DiTConfig):
    """Settings of a LightningDiT; the defaults are the released models'. With every flag off it is a DiT.

    rms_norm: RMSNorm with weights in place of LayerNorm (in the QK norm too). swiglu: feed-forward of hidden width
    int(2/3 * mlp_ratio * width). rope: rotary positions, rows then columns, beside the sine-cosine table, which stays.
    qk_norm: a norm of queries and keys per head. shift: False leaves scales and gates only (adaLN4).
    """

    family: ClassVar[str] = "lightning-dit"
    process: ClassVar[Mapping[str, Any]] = {"name": "linear", "predicts": "v"}
    sign: ClassVar[int] = -1

    patch: int = 1
    image_size: int = 16
    channels: int = 32
    learn_sigma: bool = False
    rms_norm: bool = True
    swiglu: bool = True
    rope: bool = True
    qk_norm: bool = False
    shift: bool = True
    theta: float = 10000.0
    time: TimeInput = REVERSED

    @property
    def norm(self) -> str:
        """The norm of blocks and head, by name."""
        return "rms" if self.rms_norm else "layer"

    @property
    def head_norm(self) -> str | None:
        """The norm of queries and keys, by name."""
        return ("rms" if self.rms_norm else "layer-affine") if self.qk_norm else None

    def build(self) -> LightningDiT:
        return LightningDiT(self)


class ShiftlessAdaLN(AdaLN):
    """scale, gate, scale, gate from c; the shifts are zero."""

    def __init__(self, width: int):
        super().__init__(width, 4)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        scale1, gate1, scale2, gate2 = super().forward(c)
        zero = torch.zeros_like(scale1)
        return zero, scale1, gate1, zero, scale2, gate2


@register("lightning-dit", paper="Reconstruction vs. Generation, arXiv 2501.01423")
class LightningDiT(DiT):
    """DiT with RMSNorm, SwiGLU and rotary positions. Of 2C outputs (learn_sigma) the second half is dropped.

    x [B, C, H, W]; prediction [B, C, H, W], the velocity dx/dt: minus what the official network returns.
    """

    missing: ClassVar[Mapping[str, str]] = {
        kind: reason.replace("DiT", "LightningDiT") for kind, reason in DiT.missing.items()
    }
    preset: LightningDiTConfig

    def make_block(self, layer: int) -> DiTBlock:
        c = self.preset
        hidden = int(c.width * c.mlp_ratio)
        return DiTBlock(
            c.width,
            c.heads,
            norms=(norm(c.norm, c.width), norm(c.norm, c.width)),
            mlp=SwiGLU(c.width, int(2 / 3 * hidden)) if c.swiglu else MLP(c.width, hidden),
            modulation=AdaLN(c.width, 6) if c.shift else ShiftlessAdaLN(c.width),
            attn=self.make_attention(layer, qk_norm=c.head_norm),
        )

    def make_head(self) -> Head:
        c = self.preset
        return Head(c.width, c.patch, c.out_channels, norm(c.norm, c.width))

    def rotary(self, joined: Joined) -> tuple[Tensor, Tensor] | None:
        c, device = self.preset, joined.tokens.device
        if not c.rope:
            return None
        axes = axial_axes(c.width // c.heads)
        if len(joined.layout.spans) == 1:
            return rotary_grid(*joined.layout.grid, axes=axes, theta=c.theta, device=device)
        cos, sin = rotary(joined.positions, axes, c.theta)
        return cos.to(device), sin.to(device)

    def head(self, streams: Streams, context: Context) -> Tensor:
        return self.preset.sign * super().head(streams, context)[:, : self.preset.channels]


SIZES = {
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "1p0B": (24, 1536, 24),
    "1p6B": (28, 1792, 28),
}
PRESETS = {
    f"LightningDiT-{size}/{patch}": LightningDiTConfig(
        depth=depth, width=width, heads=heads, patch=patch, image_size=image_size
    )
    for patch, image_size in ((1, 16), (2, 32))
    for size, (depth, width, heads) in SIZES.items()
}
