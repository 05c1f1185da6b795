"""LI-DiT: Exploring the Role of Large Language Models in Prompt Encoding for Diffusion Models (Ma et al., 2024).

arXiv 2406.11831. An MMDiT that reads language models: a refiner of their tokens, with full attention within a model and
between models, takes out the bias of causal encoders.

No code was released. The refiner's order of parts follows the paper's text; its depth, the widths of encoders and the
shapes of the two sizes, chosen so that their counts are the published 1B and 10B, are a reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditloom.backbones.mmdit import MMDiT, MMDiTConfig
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Memory
from ditloom.parts import cost
from ditloom.parts.checks import check_heads, check_rows, check_text
from ditloom.parts.refiner import TokenRefiner


@dataclass(frozen=True, kw_only=True)
class LiDiTConfig(MMDiTConfig):
    """Settings of a LI-DiT.

    more_widths: of the tokens of further language models, given as Condition.extra["text_2"] [B, n, width] (and
    "text_3", ...) with masks "text_2_mask"; the last ones may be left out. refiner_depth: layers of the refiner.
    """

    family: ClassVar[str] = "li-dit"

    qk_norm: str | None = "rms"
    more_widths: tuple[int, ...] = ()
    refiner_depth: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.width, self.heads)
        if not self.pooled_width:
            raise UserError("LI-DiT modulates its refiner by a pooled text vector: pooled_width cannot be 0")

    def build(self) -> LiDiT:
        return LiDiT(self)


@register("li-dit", paper="Exploring the Role of LLMs in Prompt Encoding for Diffusion Models, arXiv 2406.11831")
class LiDiT(MMDiT):
    """MMDiT behind a refiner of text tokens, which runs at every step, for time modulates it.

    x [B, C, H, W]; prediction [B, C, H, W]. Every language model's tokens are a segment of the text stream.
    """

    title: ClassVar[str] = "LI-DiT"
    missing: ClassVar[Mapping[str, str]] = {
        kind: reason.replace("MMDiT", "LI-DiT") for kind, reason in MMDiT.missing.items()
    }
    preset: LiDiTConfig

    def __init__(self, config: LiDiTConfig):
        super().__init__(config)
        self.more_embedders = nn.ModuleList(nn.Linear(w, config.width) for w in config.more_widths)
        branches = 1 + len(config.more_widths)
        self.refiner = TokenRefiner(
            config.width, config.heads, config.refiner_depth, branches, config.mlp_ratio, config.qk_norm
        )
        self.initialise()

    def prepare(self, condition: Condition) -> Memory:
        memory = super().prepare(condition)
        _check_masks({"text": condition.text_mask, **condition.extra})
        extra: dict[str, Tensor] = {}
        known = _names(len(self.more_embedders))
        for name, embed, width in zip(known, self.more_embedders, self.preset.more_widths, strict=True):
            if name not in condition.extra:
                break
            mask = condition.extra.get(f"{name}_mask")
            text = check_text(condition.extra[name], mask, width, f"LI-DiT as {name}")
            assert memory.text is not None
            check_rows(memory.text, text, name)
            extra[name] = embed(text.to(self.dtype))
            if mask is not None:
                extra[f"{name}_mask"] = mask
        for name in condition.extra:
            if name not in extra:
                reads = " and then ".join(["text", *known])
                raise UserError(f"this LI-DiT reads {reads} with their masks; it has no place for {name!r}")
        return replace(memory, extra=extra)

    def refine(self, memory: Memory, time: Tensor) -> tuple[Memory, Sequence[Segment]]:
        assert memory.text is not None
        assert memory.vector is not None
        more = [name for name in _names(len(self.more_embedders)) if name in memory.extra]
        masks = [memory.text_mask, *(memory.extra.get(f"{name}_mask") for name in more)]
        texts = [memory.text, *(memory.extra[name] for name in more)]
        first, *others = self.refiner(texts, masks, time + memory.vector)
        segments = [Segment(name, x, weights="text", emit=True) for name, x in zip(more, others, strict=True)]
        return replace(memory, text=first), segments

    def masks(self, memory: Memory) -> dict[str, Tensor | None]:
        more = {k.removesuffix("_mask"): v for k, v in memory.extra.items() if k.endswith("_mask")}
        return {**super().masks(memory), **more}

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        x, t, condition = super().example(batch, device)
        widths, n = self.preset.more_widths, self.preset.text_tokens
        more = {k: torch.randn(batch, n, w, device=device) for k, w in zip(_names(len(widths)), widths, strict=True)}
        return x, t, replace(condition, extra=more)

    def end_macs(self, layout: Layout) -> dict[str, int]:
        names = [name for name in ("text", *_names(len(self.more_embedders))) if name in layout]
        tokens = [layout.span(name).length for name in names]
        projections = sum(cost.linear(e, n) for e, n in zip(self.more_embedders, tokens[1:], strict=False))
        ends = super().end_macs(layout)
        return {**ends, "embed": ends["embed"] + projections + self.refiner.macs(tokens)}


def _names(more: int) -> list[str]:
    """Of the further language models' tokens: text_2, text_3, ..."""
    return [f"text_{n + 2}" for n in range(more)]


def _check_masks(given: Mapping[str, Tensor | None]) -> None:
    for name, mask in given.items():
        if mask is None or mask.is_meta or not (name == "text" or name.endswith("_mask")):
            continue
        if not torch.compiler.is_compiling() and not bool(mask.any(1).all()):
            raise UserError(f"the mask of {name} leaves a row without any token: the refiner needs at least one")


def _released(depth: int) -> LiDiTConfig:
    """As in SD3 width 64 N of N blocks with N heads; two language models of width 4096 (LLaMA3-8B and Qwen1.5-7B)."""
    return LiDiTConfig(
        depth=depth, width=64 * depth, heads=depth, text_tokens=128, pooled_width=4096, more_widths=(4096,)
    )


PRESETS: dict[str, Any] = {"LI-DiT-1B": _released(18), "LI-DiT-10B": _released(40)}
