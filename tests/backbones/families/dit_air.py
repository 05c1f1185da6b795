"""DiT-Air; what surrounds the blocks is a reconstruction, the blocks' own numbers are the paper's law."""

from __future__ import annotations

from ditloom.backbones.dit_air import DiTAirConfig
from tests.backbones.portrait import ODD_HEAD, TEXT, Portrait

AIR = {**ODD_HEAD, **TEXT, "pooled_width": 20}
# the text that leaves the last block of two streams is read by nothing; the paper counts its weights all the same
LAST = {f"blocks.2.text.{name}.{p}" for name in ("attn.proj", "mlp.fc1", "mlp.fc2") for p in ("weight", "bias")}
PORTRAIT = Portrait(
    tiny={
        "dit-air": DiTAirConfig(**AIR),
        "dit-air-lite": DiTAirConfig(**AIR, tied=("modulation", "attn", "mlp")),
        "dit-air-dual": DiTAirConfig(**AIR, dual=True),
    },
    dead={"dit-air-dual": frozenset(LAST)},
    unread={"dit-air-dual": frozenset(LAST)},
    counted=("DiT-Air/B", "DiT-Air/B-lite-full"),
    counts={
        "DiT-Air/B": 311_415_584,
        "DiT-Air/B-lite-attention": 221_094_176,
        "DiT-Air/B-lite-full": 40_510_112,
        "MMDiT/B": 869_220_896,
        "MMDiT/B-shared-AdaLN": 598_256_672,
    },
)
