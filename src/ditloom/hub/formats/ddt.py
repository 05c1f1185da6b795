"""State dicts of MCG-NJU/DDT (src/models/denoiser/decoupled_improved_dit.py)."""

from __future__ import annotations

from typing import ClassVar

from ditloom.backbones.ddt import DDTConfig
from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, split_null
from ditloom.hub.formats.facebook_dit import REST
from ditloom.hub.keymap import LINEAR, Fuse, KeyMap, Move

PATCH = 2
RELEASED = {28: 22}


@register("ddt", paper="DDT: Decoupled Diffusion Transformer, arXiv 2504.05741")
class DDTStateDict(Format):
    """The denoiser of a checkpoint of that repository; of a training run's file the average is taken."""

    family: ClassVar[str] = "ddt"
    keymap: ClassVar[KeyMap] = KeyMap(
        Move("x_embedder.proj.{p}", "x_embedder.proj.{p}", LINEAR),
        Move("s_embedder.proj.{p}", "s_embedder.proj.{p}", LINEAR),
        Move("blocks.{i}.adaLN_modulation.0.{p}", "blocks.{i}.modulation.linear.{p}"),
        Move("final_layer.adaLN_modulation.0.{p}", "final_layer.modulation.linear.{p}"),
        Fuse(("blocks.{i}.mlp.w1.weight", "blocks.{i}.mlp.w3.weight"), "blocks.{i}.mlp.w12.weight"),
        Move("blocks.{i}.mlp.w2.weight", "blocks.{i}.mlp.w3.weight"),
        REST,
    )

    def recognises(self, foreign: Foreign) -> bool:
        return {"s_embedder.proj.weight", "blocks.0.adaLN_modulation.0.weight"} <= foreign.tensors.keys()

    def config(self, foreign: Foreign) -> DDTConfig:
        width, features = foreign.shape("x_embedder.proj.weight")
        blocks = foreign.count(r"blocks\.(\d+)\.")
        if blocks not in RELEASED:
            raise UserError(
                f"weights do not tell where the encoder of a DDT ends; of {blocks} blocks none is published: "
                "give the configuration"
            )
        classes, null = split_null(foreign.shape("y_embedder.embedding_table.weight")[0])
        return DDTConfig(
            depth=RELEASED[blocks],
            head_depth=blocks - RELEASED[blocks],
            width=width,
            heads=width // foreign.shape("blocks.0.attn.q_norm.weight")[0],
            patch=PATCH,
            channels=features // PATCH**2,
            classes=classes,
            null_class=null,
        )
