"""Keys and values on a coarser grid than the queries (PixArt-Sigma, arXiv 2403.04692, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.parts import cost
from ditloom.parts.grids import to_map, to_tokens


class KVCompression(nn.Module):
    """A depthwise R x R convolution of stride R, an average at the start, then an affine LayerNorm over the width.

    Keys and values pass through the same weights, before or after they are cut into heads: [B, h * w, ...].
    A grid that R does not divide loses its last rows or columns.
    """

    def __init__(self, width: int, ratio: int):
        super().__init__()
        if ratio < 2:
            raise UserError(f"keys are compressed by 2 or more; got {ratio}")
        self.ratio = ratio
        self.conv = nn.Conv2d(width, width, ratio, stride=ratio, groups=width)
        self.norm = nn.LayerNorm(width)
        self.initialise()

    def initialise(self) -> None:
        """An average."""
        with torch.no_grad():
            self.conv.weight.fill_(1 / self.ratio**2)
            self.conv.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        y = self.norm(to_tokens(self.conv(to_map(x.flatten(2), grid))))
        return y.unflatten(-1, x.shape[2:])

    def length(self, grid: tuple[int, ...]) -> int:
        """Tokens that are left."""
        return (grid[-2] // self.ratio) * (grid[-1] // self.ratio)

    def macs(self, grid: tuple[int, ...]) -> int:
        """Of keys and values."""
        return 2 * cost.convolution(self.conv, self.length(grid))


class Subsampling(nn.Module):
    """Every R-th token of every R-th row ("uniform"), without weights; the release's "ave" picks the same tokens."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.ratio = ratio

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return x.unflatten(1, grid)[:, :: self.ratio, :: self.ratio].flatten(1, 2)

    def length(self, grid: tuple[int, ...]) -> int:
        """Tokens that are left."""
        return -(-grid[-2] // self.ratio) * -(-grid[-1] // self.ratio)

    def macs(self, grid: tuple[int, ...]) -> int:
        """None."""
        return 0


class EveryToken(Subsampling):
    """Every R-th token of the whole sequence ("uniform-every")."""

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return x[:, :: self.ratio]

    def length(self, grid: tuple[int, ...]) -> int:
        return -(-grid[-2] * grid[-1] // self.ratio)


KINDS: dict[str, type[KVCompression] | type[Subsampling]] = {
    "conv": KVCompression,
    "uniform": Subsampling,
    "uniform-every": EveryToken,
}


def compression(kind: str, width: int, ratio: int) -> KVCompression | Subsampling:
    """A compression by name."""
    if kind not in KINDS:
        raise UnknownName("compression of keys and values", kind, KINDS)
    return KINDS[kind](width, ratio)
