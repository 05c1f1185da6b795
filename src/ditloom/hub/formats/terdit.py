"""State dicts of Lucky-Lance/TerDiT in training (models.py): latent weights and a scale beside each.

Checkpoints packed for its inference kernel are another format.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ditloom.backbones import terdit
from ditloom.backbones.terdit import TerDiTConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, known_heads, refuse_unless, split_null
from ditloom.hub.formats.facebook_dit import REST
from ditloom.hub.keymap import LINEAR, Fuse, KeyMap, Move

QKV = ("wq", "wk", "wv")
PATCH = 2


def _fused(module: str, parts: tuple[str, ...], ours: str, leaf: str) -> Fuse:
    return Fuse(tuple(f"layers.{{i}}.{module}.{part}.{leaf}" for part in parts), f"blocks.{{i}}.{ours}.{leaf}")


@register("terdit", paper="TerDiT: Ternary Diffusion Models with Transformers, arXiv 2405.14854")
class TerDiTStateDict(Format):
    """A training checkpoint of that repository."""

    family: ClassVar[str] = "terdit"
    keymap: ClassVar[KeyMap] = KeyMap(
        Move("x_embedder.{p}", "x_embedder.proj.{p}", LINEAR),
        *(_fused("attention", QKV, "attn.qkv", leaf) for leaf in ("weight", "alphas")),
        *(_fused("feed_forward", ("w1", "w3"), "mlp.w12", leaf) for leaf in ("weight", "alphas")),
        Move("layers.{i}.attention.wo.{rest}", "blocks.{i}.attn.proj.{rest}"),
        Move("layers.{i}.feed_forward.w2.{rest}", "blocks.{i}.mlp.w3.{rest}"),
        Move("layers.{i}.attention_norm.{p}", "blocks.{i}.norm1.{p}"),
        Move("layers.{i}.ffn_norm.{p}", "blocks.{i}.norm2.{p}"),
        Move("layers.{i}.adaLN_modulation.1.{rest}", "blocks.{i}.modulation.linear.{rest}"),
        Move("layers.{i}.adaLN_modulation.2.{p}", "blocks.{i}.modulation.norm.{p}"),
        Move("final_layer.adaLN_modulation.1.{p}", "final_layer.modulation.linear.{p}"),
        REST,
    )

    def recognises(self, foreign: Foreign) -> bool:
        return "layers.0.attention.wq.alphas" in foreign.tensors

    def config(self, foreign: Foreign) -> TerDiTConfig:
        width, features = foreign.shape("x_embedder.weight")
        depth = foreign.count(r"layers\.(\d+)\.")
        classes, null = split_null(foreign.shape("y_embedder.embedding_table.weight")[0])
        return TerDiTConfig(
            depth=depth,
            width=width,
            heads=known_heads(terdit.PRESETS, depth, width, "TerDiT"),
            patch=PATCH,
            channels=features // PATCH**2,
            classes=classes,
            null_class=null,
            learn_sigma=foreign.shape("final_layer.linear.weight")[0] == 2 * features,
        )

    def settings(self, config: Any) -> dict[str, Any]:
        refuse_unless(config, "terdit", ternary=True)
        return {}
