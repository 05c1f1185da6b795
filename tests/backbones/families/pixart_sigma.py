"""PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

from ditloom.backbones.pixart_sigma import PixArtConfig
from tests.backbones.portrait import ODD_HEAD, TEXT, Portrait

PIXART = {**ODD_HEAD, **TEXT}
PORTRAIT = Portrait(
    tiny={
        "pixart-sigma": PixArtConfig(**PIXART, interpolation=2.0),
        "pixart-sigma-sized": PixArtConfig(**PIXART, sized=True, learn_sigma=False),
        "pixart-sigma-compressed": PixArtConfig(**PIXART, compressed=(1, 2), qk_norm="layer-affine-full"),
    },
    outputs={"pixart-sigma": 8, "pixart-sigma-compressed": 8},
    identity_start=False,  # gates start as a random table
    counted=("PixArt-Sigma-XL/2-1024-MS-KVC", "PixArt-alpha-XL/2-1024-MS"),
    counts={
        "PixArt-alpha-XL/2-256": 610_856_096,
        "PixArt-alpha-XL/2-512": 610_856_096,
        "PixArt-alpha-XL/2-1024-MS": 611_349_152,
        "PixArt-Sigma-XL/2-256-MS": 610_856_096,
        "PixArt-Sigma-XL/2-512-MS": 610_856_096,
        "PixArt-Sigma-XL/2-1024-MS": 610_856_096,
        "PixArt-Sigma-XL/2-2K-MS": 610_856_096,
        "PixArt-Sigma-XL/2-1024-MS-KVC": 610_968_992,
        "PixArt-Sigma-XL/2-2K-MS-KVC": 610_968_992,
    },
)
