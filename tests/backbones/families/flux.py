"""FLUX."""

from __future__ import annotations

from ditloom.backbones.flux import FluxConfig
from tests.backbones.portrait import ODD_HEAD, TEXT, Portrait

FLUX = {**ODD_HEAD, **TEXT, "depth": 2, "single_depth": 3, "pooled_width": 20, "axes": (4, 8, 12)}
PORTRAIT = Portrait(
    tiny={
        "flux": FluxConfig(**FLUX),
        "flux-guided": FluxConfig(**{**FLUX, "depth": 1, "single_depth": 2}, guidance=2.0),
    },
    counted=("FLUX.1-dev", "FLUX.1-schnell"),
    counts={"FLUX.1-dev": 11_901_408_320, "FLUX.1-schnell": 11_891_178_560},
)
