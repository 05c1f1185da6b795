"""TerDiT: Ternary Diffusion Models with Transformers (Lu et al., arXiv 2405.14854).

A class-conditional Large-DiT in the LLaMA manner: RMSNorm, SwiGLU, rotary positions along the row-major sequence, no
absolute ones, no biases. Its linear layers are ternary in training, and a norm follows the modulation's, whose ternary
outputs would be far too large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ditloom.backbones.dit import DiT, DiTBlock, DiTConfig
from ditloom.contracts.backbone import Block
from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register
from ditloom.parts.attention import SelfAttention
from ditloom.parts.feed_forward import SwiGLU
from ditloom.parts.heads import Head
from ditloom.parts.modulation import AdaLN
from ditloom.parts.norms import norm
from ditloom.parts.positions import check_axes, rotary
from ditloom.parts.segments import Joined
from ditloom.parts.ternary import NormedAdaLN, TernaryLinear

EPS = "rms-1e-5"


@dataclass(frozen=True, kw_only=True)
class TerDiTConfig(DiTConfig):
    """Settings of a TerDiT. `ternary=False`: the same trunk, its norm included, with full-precision layers.

    multiple: the feed-forward's hidden width, 2/3 of `mlp_ratio` times the width, is rounded up to a multiple of it.
    condition: the largest width of the conditioning vector.
    """

    family: ClassVar[str] = "terdit"

    ternary: bool = True
    multiple: int = 256
    condition: int = 1024
    theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.attention != "softmax":
            raise UserError(f"TerDiT has softmax attention; got the kind {self.attention!r}")
        check_axes((self.width // self.heads,), self.width // self.heads)

    @property
    def condition_width(self) -> int:
        return min(self.width, self.condition)

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward network."""
        hidden = int(2 * int(self.width * self.mlp_ratio) / 3)
        return -(-hidden // self.multiple) * self.multiple

    def linear(self, inputs: int, outputs: int, bias: bool = False, parts: int = 1) -> nn.Linear:
        """A layer inside a block."""
        return TernaryLinear(inputs, outputs, bias, parts) if self.ternary else nn.Linear(inputs, outputs, bias)

    def build(self) -> TerDiT:
        return TerDiT(self)


@register("terdit", paper="TerDiT: Ternary Diffusion Models with Transformers, arXiv 2405.14854")
class TerDiT(DiT):
    """A DiT of ternary layers; embeddings, norms and the final layer keep full precision.

    x [B, C, H, W] with H, W multiples of the patch; prediction [B, C or 2C, H, W].
    """

    missing: ClassVar[Mapping[str, str]] = {kind: why.replace("DiT", "TerDiT") for kind, why in DiT.missing.items()}
    absolute: ClassVar[bool] = False
    preset: TerDiTConfig

    def make_block(self, layer: int) -> Block:
        c = self.preset
        attn, mlp = SelfAttention(c.width, c.heads, qkv_bias=False), SwiGLU(c.width, c.hidden, bias=False)
        attn.qkv, attn.proj = c.linear(c.width, 3 * c.width, parts=3), c.linear(c.width, c.width)
        mlp.w12, mlp.w3 = c.linear(c.width, 2 * c.hidden, parts=2), c.linear(c.hidden, c.width)
        condition = c.condition_width
        modulation = NormedAdaLN(c.width, 6, condition, c.linear(condition, 6 * c.width, bias=True))
        norms = (norm(EPS, c.width), norm(EPS, c.width))
        return DiTBlock(c.width, c.heads, norms=norms, mlp=mlp, attn=attn, modulation=modulation)

    def make_head(self) -> Head:
        c = self.preset
        head = Head(c.width, c.patch, c.out_channels)
        head.modulation = AdaLN(c.width, 2, c.condition_width)
        return head

    def initialise(self) -> None:
        """As DiT: identity blocks and a zero output; every ternary scale begins at its layer's mean size."""
        super().initialise()
        for kind in (TernaryLinear, NormedAdaLN):
            for module in self.modules():
                if isinstance(module, kind):
                    module.initialise()

    def rotary(self, joined: Joined) -> tuple[Tensor, Tensor]:
        """Positions along the row-major sequence, one axis for the whole head."""
        columns = joined.layout.grid[1]
        places: Any = joined.positions[:, :1] * columns + joined.positions[:, 1:]
        cos, sin = rotary(places, (self.preset.width // self.preset.heads,), self.preset.theta)
        return cos.to(joined.tokens.device), sin.to(joined.tokens.device)


PRESETS = {
    "TerDiT-600M/2": TerDiTConfig(depth=16, width=1536, heads=32),
    "TerDiT-4.2B/2": TerDiTConfig(depth=32, width=3072, heads=32),
}
