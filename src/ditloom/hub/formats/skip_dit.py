"""State dicts of OpenSparseLLMs/Skip-DiT, class to image: those of DiT, with the merges of the second half apart."""

from __future__ import annotations

from typing import Any, ClassVar

from ditloom.backbones import dit
from ditloom.backbones.skip_dit import SkipDiTConfig
from ditloom.contracts.registry import register
from ditloom.hub.format import Foreign, Format, refuse_unless
from ditloom.hub.formats.facebook_dit import MODULATIONS, POSITIONS, REST, read_sizes
from ditloom.hub.keymap import KeyMap, Move


def _second_half(config: Any) -> range:
    return range(config.depth // 2, config.depth)


@register("skip-dit", paper="Accelerating Vision Diffusion Transformers with Skip Branches, arXiv 2411.17616")
class SkipDiTStateDict(Format):
    """What train.py of that repository writes for the model DiT-skip."""

    family: ClassVar[str] = "skip-dit"
    keymap: ClassVar[KeyMap] = KeyMap(
        POSITIONS,
        *MODULATIONS,
        Move("skip_norms.{i}.{p}", "blocks.{i}.merge.norm.{p}", where=_second_half, from_zero=True),
        Move("skip_linears.{i}.linear.{p}", "blocks.{i}.merge.linear.{p}", where=_second_half, from_zero=True),
        REST,
    )

    def recognises(self, foreign: Foreign) -> bool:
        tops = {key.partition(".")[0] for key in foreign.tensors}
        return {"skip_norms", "skip_linears", "final_layer"} <= tops

    def config(self, foreign: Foreign) -> SkipDiTConfig:
        sizes = read_sizes(foreign, dit.PRESETS, "DiT")
        return SkipDiTConfig(**sizes, mlp_ratio=foreign.shape("blocks.0.mlp.fc1.weight")[0] / sizes["width"])

    def settings(self, config: Any) -> dict[str, Any]:
        refuse_unless(config, "skip-dit", residual=False, attention="softmax")
        return {}
