"""DiT-DH: Diffusion Transformers with Representation Autoencoders (Zheng et al., arXiv 2510.11690).

A DiT of ordinary width conditions a shallow, very wide head that sees the noisy tokens again, so that latents of many
channels (768, those of DINOv2-B) fit through. The head is that of DDT, the blocks are those of LightningDiT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ditloom.backbones.ddt import DDT, DDTConfig, TokenHead
from ditloom.contracts.registry import register
from ditloom.contracts.time import FLOW, TimeInput
from ditloom.parts.feed_forward import SwiGLU
from ditloom.parts.fourier import FourierTimeEmbedding
from ditloom.parts.modulation import AdaLN
from ditloom.parts.norms import norm
from ditloom.parts.patches import zero_
from ditloom.parts.positions import rotary
from ditloom.parts.segments import Joined


@dataclass(frozen=True, kw_only=True)
class DiTDHConfig(DDTConfig):
    """Settings of a DiT-DH: `depth`, `width`, `heads` of the encoder, and those of the head.

    Its time is the noise level itself, and released weights predict noise - x0. Their latents are standardised with
    statistics of the training set, and their times are shifted by sqrt(numbers in a latent / 4096).
    """

    family: ClassVar[str] = "dit-dh"
    sign: ClassVar[int] = 1

    head_depth: int = 2
    head_width: int = 2048
    head_heads: int = 16
    patch: int = 1
    image_size: int = 16
    channels: int = 768
    time: TimeInput = FLOW

    @property
    def head_size(self) -> tuple[int, int]:
        return self.head_width, self.head_heads

    def build(self) -> DiTDH:
        return DiTDH(self)


@register("dit-dh", paper="Diffusion Transformers with Representation Autoencoders, arXiv 2510.11690")
class DiTDH(DDT):
    """Encoder with sine-cosine and rotary positions, wide head with rotary ones; RMSNorm, SwiGLU, no QK norm.

    x [B, C, H, W] with H, W multiples of the patch; prediction [B, C, H, W], the velocity dx/dt.
    """

    missing: ClassVar[Mapping[str, str]] = {kind: why.replace("DDT", "DiT-DH") for kind, why in DDT.missing.items()}
    preset: DiTDHConfig
    absolute: ClassVar[bool] = True

    def make_time_embedding(self) -> nn.Module:
        return FourierTimeEmbedding(self.preset.width)

    def make_parts(self, width: int, heads: int) -> dict[str, Any]:
        return {
            "norms": (norm("rms", width), norm("rms", width)),
            "mlp": SwiGLU(width, int(2 / 3 * int(width * self.preset.mlp_ratio))),
            "modulation": AdaLN(width, 6),
        }

    def make_head(self) -> TokenHead:
        c, width = self.preset, self.preset.head_width
        return TokenHead(width, c.patch, c.channels, norm("rms", width), AdaLN(width, 2))

    def initialise(self) -> None:
        """As DDT, and every block starts as the identity; other linears keep torch's defaults."""
        super().initialise()
        zero_(*(m for m in self.modules() if isinstance(m, AdaLN)))

    def rotary(self, joined: Joined, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Coordinates in tokens; the first half of a head turns by row, the second by column."""
        cos, sin = rotary(joined.positions, axes, self.preset.theta)
        return cos.to(joined.tokens.device), sin.to(joined.tokens.device)


SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PRESETS = {
    f"DiT-DH-{size}": DiTDHConfig(depth=depth, width=width, heads=heads)
    for size, (depth, width, heads) in SIZES.items()
}
