"""State dicts of PixArt-alpha/PixArt-alpha and PixArt-alpha/PixArt-sigma, with compressed keys and the null caption."""

from __future__ import annotations

import re
from typing import ClassVar

from ditloom.backbones import pixart_sigma
from ditloom.backbones.pixart_sigma import PixArtConfig
from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, known_heads
from ditloom.hub.keymap import KeyMap, Move

BLOCK, OURS = "blocks.{i}.", "blocks.{i}."
PIXELS = {"256": 32, "512": 64, "1024": 128, "2K": 256}
ALPHA_TOKENS = 120


@register("pixart", paper="PixArt-Sigma, arXiv 2403.04692; PixArt-alpha, arXiv 2310.00426")
class PixArtStateDict(Format):
    """PixArt-Sigma-XL-2-1024-MS.pth and its like. Weights do not tell the size they were trained at; names do."""

    family: ClassVar[str] = "pixart-sigma"
    unused: ClassVar[tuple[str, ...]] = ("pos_embed",)
    keymap: ClassVar[KeyMap] = KeyMap(
        Move("t_block.1.{p}", "modulation.linear.{p}"),
        Move("csize_embedder.mlp.{rest}", "size_embedder.size.mlp.{rest}"),
        Move("ar_embedder.mlp.{rest}", "size_embedder.aspect.mlp.{rest}"),
        Move("y_embedder.y_proj.{rest}", "text_embedder.{rest}"),
        Move("y_embedder.y_embedding", "null_text"),
        Move(BLOCK + "scale_shift_table", OURS + "modulation.table"),
        Move(BLOCK + "attn.sr.{p}", OURS + "attn.compression.conv.{p}"),
        Move(BLOCK + "attn.norm.{p}", OURS + "attn.compression.norm.{p}"),
        *(Move(BLOCK + f"attn.{x}_norm.{{p}}", OURS + f"attn.{x}_norm.norm.{{p}}") for x in "qk"),
        Move(BLOCK + "cross_attn.q_linear.{p}", OURS + "cross.q.{p}"),
        Move(BLOCK + "cross_attn.kv_linear.{p}", OURS + "cross.kv.{p}"),
        Move(BLOCK + "cross_attn.proj.{p}", OURS + "cross.proj.{p}"),
        Move("final_layer.scale_shift_table", "final_layer.modulation.table"),
        Move("{rest}", "{rest}"),
    )

    def recognises(self, foreign: Foreign) -> bool:
        needed = {
            "t_block.1.weight",
            "y_embedder.y_embedding",
            "final_layer.scale_shift_table",
            "x_embedder.proj.weight",
        }
        return needed <= foreign.tensors.keys() and "blocks.0.cross_attn.q_linear.weight" in foreign.tensors

    def config(self, foreign: Foreign) -> PixArtConfig:
        keys = foreign.tensors
        width, channels, patch, _ = foreign.shape("x_embedder.proj.weight")
        depth = foreign.count(r"blocks\.(\d+)\.")
        tokens, text_width = foreign.shape("y_embedder.y_embedding")
        image_size = _image_size(foreign)
        compressed = tuple(i for i in range(depth) if f"blocks.{i}.attn.sr.weight" in keys)
        finest = 64 if tokens == ALPHA_TOKENS else 0  # alpha does not squeeze the coordinates of small pictures
        return PixArtConfig(
            depth=depth,
            width=width,
            heads=known_heads(pixart_sigma.PRESETS, depth, width, "PixArt"),
            patch=patch,
            image_size=image_size,
            channels=channels,
            text_width=text_width,
            text_tokens=tokens,
            learn_sigma=foreign.shape("final_layer.linear.weight")[0] == 2 * channels * patch**2,
            mlp_ratio=foreign.shape("blocks.0.mlp.fc1.weight")[0] / width,
            interpolation=max(image_size, finest) / 64,
            sized="csize_embedder.mlp.0.weight" in keys,
            compressed=compressed,
            compression=foreign.shape(f"blocks.{compressed[0]}.attn.sr.weight")[-1] if compressed else 2,
            qk_norm="layer-affine-full" if "blocks.0.attn.q_norm.weight" in keys else None,
            null_tokens=tokens,
        )


def _image_size(foreign: Foreign) -> int:
    found = re.search(r"(?<!\d)(256|512|1024|2K)(?!\d)", foreign.model)
    if found is None:
        raise UserError(
            f"the size that {foreign.name} was trained at cannot be read from its weights, nor from a name such as "
            "PixArt-Sigma-XL-2-1024-MS.pth: give the configuration"
        )
    return PIXELS[found[1]]
