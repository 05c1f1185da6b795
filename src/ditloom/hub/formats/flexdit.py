"""State dicts of changsn/SparseDiT (models.py): DiT's blocks under the names of their part of the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ditloom.backbones import dit
from ditloom.backbones.flexdit import FlexDiTConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, known_heads, split_null, square_side
from ditloom.hub.formats.facebook_dit import MODULATIONS, POSITIONS, REST
from ditloom.hub.keymap import KeyMap, Placed

PARTS = ("token_merge_blocks", "semantic_blocks", "token_recover_blocks", "normal_blocks")


def block_names(config: FlexDiTConfig) -> Mapping[int, Mapping[str, Any]]:
    """Their name of every block, by its place in our list (in which a pooling stands before every group)."""
    names: list[str | None] = [f"poolingformer_blocks.{i}" for i in range(config.pooling)]
    for g in range(config.groups):
        names.append(None)
        for part, size in zip(PARTS, config.group, strict=True):
            names += [f"dumbbell_blocks.{g}.{part}.{i}" for i in range(size)]
    names += [f"normal_blocks.{i}" for i in range(config.dense)]
    return {position: {"name": name} for position, name in enumerate(names) if name is not None}


def _placed(theirs: str, ours: str) -> Placed:
    return Placed(f"{{name}}.{theirs}", f"blocks.{{i}}.{ours}", places=block_names)


@register("flexdit", paper="SparseDiT: Dynamic Token Density Control, arXiv 2412.06028")
class FlexDiTStateDict(Format):
    """What train.py of that repository writes. The side of the pooled grid is in no tensor: 8 is taken."""

    family: ClassVar[str] = "flexdit"
    keymap: ClassVar[KeyMap] = KeyMap(
        POSITIONS,
        _placed("adaLN_modulation.1.{p}", "modulation.linear.{p}"),
        _placed("merged_layer1.{p}", "from_sparse.{p}"),
        _placed("merged_layer2.{p}", "from_full.{p}"),
        _placed("{rest}", "{rest}"),
        *MODULATIONS[1:],
        REST,
    )

    def recognises(self, foreign: Foreign) -> bool:
        return any(key.startswith("dumbbell_blocks.0.token_recover_blocks.0.") for key in foreign.tensors)

    def config(self, foreign: Foreign) -> FlexDiTConfig:
        width, channels, patch, _ = foreign.shape("x_embedder.proj.weight")
        pooling, groups = (foreign.count(rf"{name}\.(\d+)\.") for name in ("poolingformer_blocks", "dumbbell_blocks"))
        dense = foreign.count(r"normal_blocks\.(\d+)\.")
        merge, middle, recover, last = (foreign.count(rf"dumbbell_blocks\.0\.{part}\.(\d+)\.") for part in PARTS)
        depth = pooling + groups * (merge + middle + recover + last) + dense
        classes, null = split_null(foreign.shape("y_embedder.embedding_table.weight")[0])
        return FlexDiTConfig(
            depth=depth,
            width=width,
            heads=known_heads(dit.PRESETS, depth, width, "DiT"),
            patch=patch,
            channels=channels,
            image_size=square_side(foreign.shape("pos_embed")[1], "pos_embed") * patch,
            classes=classes,
            null_class=null,
            learn_sigma=foreign.shape("final_layer.linear.weight")[0] == 2 * channels * patch**2,
            pooling=pooling,
            groups=groups,
            group=(merge, middle, recover, last),
            dense=dense,
        )
