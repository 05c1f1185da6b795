"""State dicts of facebookresearch/DiT: flat, 292 tensors for XL/2."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from torch import Tensor

from ditloom.backbones import dit
from ditloom.backbones.dit import DiTConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, known_heads, refuse_unless, split_null, square_side
from ditloom.hub.keymap import Derived, KeyMap, Move
from ditloom.parts.positions import grid_positions, sincos_at


def position_table(config: DiTConfig) -> Tensor:
    """The frozen table as these code bases store it: [1, N, D], float32."""
    side = config.image_size // config.patch
    return sincos_at(grid_positions(side, side), config.width).float()[None]


POSITIONS = Derived("pos_embed", position_table, "sine-cosine position table")
MODULATIONS = (
    Move("blocks.{i}.adaLN_modulation.1.{p}", "blocks.{i}.modulation.linear.{p}"),
    Move("final_layer.adaLN_modulation.1.{p}", "final_layer.modulation.linear.{p}"),
)
REST = Move("{rest}", "{rest}")


GROWN = (
    "skip_norms.",
    "s_embedder.",
    "blocks.0.moe.",
    "blocks.0.attn_rate.",
)  # beginnings of names that other families have besides those of DiT
MODERN = ("feat_rope.freqs_cos", ".norm1.weight", ".mlp.w12.weight", ".attn.q_norm.weight")


def has_adaln_blocks(foreign: Foreign) -> bool:
    """Whether the names are those of DiT, SiT or LightningDiT (DiMSUM has the same modulation, and scans)."""
    scans = any("_mamba." in key for key in foreign.tensors)
    return not scans and any(re.match(r"blocks\.\d+\.adaLN_modulation\.1\.", key) for key in foreign.tensors)


def is_modern(foreign: Foreign) -> bool:
    """Whether there is something that only LightningDiT has: a weighted norm, SwiGLU, rotary tables, no shifts."""
    if any(key.endswith(MODERN) for key in foreign.tensors):
        return True
    weight = foreign.tensors.get("blocks.0.adaLN_modulation.1.weight")
    return weight is not None and weight.ndim == 2 and weight.shape[0] == 4 * weight.shape[1]


def is_grown(foreign: Foreign) -> bool:
    """Whether there is something that a family of its own has beside all that DiT has."""
    return any(key.startswith(GROWN) for key in foreign.tensors)


def read_sizes(foreign: Foreign, presets: Any, family: str, heads: int | None = None) -> dict[str, Any]:
    """What DiT, SiT and LightningDiT have in common, from the shapes."""
    width, channels, patch, _ = foreign.shape("x_embedder.proj.weight")
    depth = foreign.count(r"blocks\.(\d+)\.")
    classes, null = (0, True)
    if "y_embedder.embedding_table.weight" in foreign.tensors:
        classes, null = split_null(foreign.shape("y_embedder.embedding_table.weight")[0])
    return {
        "depth": depth,
        "width": width,
        "heads": heads or known_heads(presets, depth, width, family),
        "patch": patch,
        "channels": channels,
        "image_size": square_side(foreign.shape("pos_embed")[1], "pos_embed") * patch,
        "classes": classes,
        "null_class": null,
        "learn_sigma": foreign.shape("final_layer.linear.weight")[0] == 2 * channels * patch**2,
    }


@register("facebook-dit", paper="Scalable Diffusion Models with Transformers, arXiv 2212.09748")
class FacebookDiT(Format):
    """DiT-XL-2-256x256.pt and what train.py of that repository writes."""

    family: ClassVar[str] = "dit"
    keymap: ClassVar[KeyMap] = KeyMap(POSITIONS, *MODULATIONS, REST)

    def recognises(self, foreign: Foreign) -> bool:
        return has_adaln_blocks(foreign) and not is_modern(foreign) and not is_grown(foreign)

    def config(self, foreign: Foreign) -> DiTConfig:
        sizes = read_sizes(foreign, dit.PRESETS, "DiT")
        ratio = foreign.shape("blocks.0.mlp.fc1.weight")[0] / sizes["width"]
        return DiTConfig(**sizes, mlp_ratio=ratio)

    def settings(self, config: Any) -> dict[str, Any]:
        refuse_unless(config, "facebook-dit", attention="softmax")
        return {}
