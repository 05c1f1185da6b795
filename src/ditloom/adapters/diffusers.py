"""What all transformers of diffusers share: their containers, their versions, and what cannot be reached in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ditloom.adapters.call import Call
from ditloom.adapters.contract import Adapter
from ditloom.parts.attention import STAGES

INSIDE = (
    "the attention of an adapted model runs as a whole in its library's own processor, so that only what enters and "
    "leaves it can be touched"
)
ATTENTION = {"attend": INSIDE, **dict.fromkeys(STAGES, INSIDE)}
CONTROLNET = "a controlnet adds to the tokens between blocks"


class DiffusersAdapter(Adapter):
    """A transformer of diffusers. Subclasses name what their family lacks in `lacks`."""

    library = "diffusers"
    versions = ("0.42", "0.43")
    lacks: ClassVar[Mapping[str, str]] = {}
    missing: ClassVar[Mapping[str, str]] = ATTENTION

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.missing = {**ATTENTION, **cls.lacks}

    def result(self, output: Tensor, call: Call) -> Any:
        if call["return_dict"] is False:
            return (output,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output)

    def prediction(self, result: Any) -> Tensor:
        return result[0]


def mask_bias(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask [B, n] (1: keep) as a bias [B, 1, n] to add to attention scores; a bias is left as it is."""
    if mask is None or mask.ndim != 2:
        return mask
    return ((1 - mask.to(x.dtype)) * -10000.0).unsqueeze(1)


def patch_macs(embedder: Any, tokens: int) -> int:
    """A strided convolution that turns patches into tokens, in two or three dimensions."""
    proj: nn.Conv2d | nn.Conv3d = embedder.proj
    return proj.weight.numel() * tokens
