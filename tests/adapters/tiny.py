"""Tiny transformers of diffusers with random weights, and how each is called: one entry per adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

Conditions = Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A transformer and its calls.

    make: the module. latent: shape of one sample of x. condition: what one branch (0: cond, 1: uncond) tells for
    `samples` rows. always: arguments without rows. times: what it is called with. time: the dtype in which it comes.
    kinds: the in-block sites it must have. order: where a block returns (image, text), or (image,). lists: names of
    its lists of blocks. turns: whether these take turns.
    """

    name: str
    make: Callable[[], nn.Module]
    latent: tuple[int, ...]
    condition: Callable[[int, Callable[..., Tensor]], dict[str, Any]]
    times: tuple[float, ...]
    kinds: tuple[str, ...]
    always: Callable[[], dict[str, Any]] = dict
    time: torch.dtype = torch.float32
    order: tuple[int, ...] = (0,)
    lists: tuple[str, ...] = ("transformer_blocks",)
    skips: bool = False
    turns: bool = False

    @property
    def module(self) -> nn.Module:
        """The module, made once."""
        return made(self.name)

    def arguments(self, x: Tensor, time: float, branches: Sequence[int] = (0, 1)) -> dict[str, Any]:
        """The call for x [samples, ...] with the rows of some branches."""
        samples = len(x)
        told = [self.condition(samples, drawer(100 * branch + 1)) for branch in branches]
        joined = {k: _joined([t[k] for t in told]) for k in told[0]}
        rows = torch.cat([x] * len(branches))
        return {
            "hidden_states": rows,
            "timestep": torch.full((len(rows),), time, dtype=self.time),
            **joined,
            **self.always(),
        }


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {k: _joined([p[k] for p in parts]) for k in parts[0]}
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]


def drawer(seed: int) -> Callable[..., Tensor]:
    """Normal numbers of a shape, always the same ones."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def shaken(module: nn.Module) -> nn.Module:
    """Every parameter redrawn, so that no zero-initialised branch hides anything."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.9 / max(parameter.shape[-1], 1) ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval().requires_grad_(False)


@cache
def made(name: str) -> nn.Module:
    return shaken(CASES[name].make())


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=5, sample_size=8
    )


def pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=5,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=12,
        use_additional_conditions=False,
    )


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
        dual_attention_layers=(1,),
        qk_norm="rms_norm",
    )


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 4),
    )


def flux_ids() -> dict[str, Any]:
    row, column = torch.arange(4.0).repeat_interleave(4), torch.arange(4.0).repeat(4)
    return {"img_ids": torch.stack([0 * row, row, column], dim=1), "txt_ids": torch.zeros(6, 3)}


def hunyuan_dit() -> nn.Module:
    from diffusers import HunyuanDiT2DModel

    return HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=6,
        cross_attention_dim=12,
        cross_attention_dim_t5=16,
        pooled_projection_dim=10,
        text_len=4,
        text_len_t5=5,
    )


def two_texts(samples: int, draw: Callable[..., Tensor]) -> dict[str, Any]:
    mask = torch.ones(samples, 4, dtype=torch.long)
    mask[0, 3:] = 0
    return {
        "encoder_hidden_states": draw(samples, 4, 12),
        "text_embedding_mask": mask,
        "encoder_hidden_states_t5": draw(samples, 5, 16),
        "text_embedding_mask_t5": torch.ones(samples, 5, dtype=torch.long),
        "image_meta_size": torch.tensor([[64.0, 64, 64, 64, 0, 0]] * samples),
        "style": torch.zeros(samples, dtype=torch.long),
    }


def rotary_table() -> dict[str, Any]:
    angles = drawer(3)(16, 8)
    return {"image_rotary_emb": (angles.cos(), angles.sin())}


def sana() -> nn.Module:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=5,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=4,
        timestep_scale=0.5,
    )


def latte() -> nn.Module:
    from diffusers import LatteTransformer3DModel

    return LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=12,
        video_length=3,
    )


def cogvideox() -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=10,
        text_embed_dim=12,
        num_layers=5,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=True,
    )


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=32,
        num_layers=5,
        rope_max_seq_len=16,
    )


def hunyuan_video() -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=12,
        pooled_projection_dim=10,
        rope_axes_dim=(4, 4, 4),
    )


def words(samples: int, draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {"encoder_hidden_states": draw(samples, 6, 12)}


def masked(samples: int, draw: Callable[..., Tensor]) -> dict[str, Any]:
    mask = torch.ones(samples, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return {**guided(samples, draw), "encoder_attention_mask": mask}


def video_table() -> dict[str, Any]:
    angles = drawer(3)(48, 16)
    return {"image_rotary_emb": (angles.cos(), angles.sin())}


DISCRETE = (999.0, 800.0, 600.0, 400.0, 200.0, 50.0)


def labels(samples: int, draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {"class_labels": (draw(samples).abs() * 300).long().clamp(max=999)}


def caption(samples: int, draw: Callable[..., Tensor]) -> dict[str, Any]:
    mask = torch.ones(samples, 6)
    mask[0, 4:] = 0
    return {"encoder_hidden_states": draw(samples, 6, 12), "encoder_attention_mask": mask}


def pooled(samples: int, draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {"encoder_hidden_states": draw(samples, 6, 12), "pooled_projections": draw(samples, 10)}


def guided(samples: int, draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {**pooled(samples, draw), "guidance": torch.full((samples,), 3.5)}


FLOWING = (1000.0, 850.0, 700.0, 500.0, 250.0, 100.0)
SIGMAS = tuple(t / 1000 for t in FLOWING)


CASES = {
    case.name: case
    for case in (
        Case("dit", dit, (4, 8, 8), labels, DISCRETE, ("attn", "mlp"), time=torch.int64),
        Case(
            "pixart",
            pixart,
            (4, 8, 8),
            caption,
            DISCRETE,
            ("attn", "cross", "mlp"),
            always=lambda: {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
            time=torch.int64,
        ),
        Case("sd3", sd3, (4, 8, 8), pooled, FLOWING, ("attn", "mlp"), order=(1, 0)),
        Case(
            "flux",
            flux,
            (16, 16),
            guided,
            SIGMAS,
            ("attn", "mlp"),
            always=flux_ids,
            order=(1, 0),
            lists=("transformer_blocks", "single_transformer_blocks"),
        ),
        Case(
            "hunyuan-dit",
            hunyuan_dit,
            (4, 8, 8),
            two_texts,
            DISCRETE,
            ("attn", "cross", "mlp"),
            always=rotary_table,
            lists=("blocks",),
            skips=True,
        ),
        Case(
            "latte",
            latte,
            (4, 3, 8, 8),
            words,
            DISCRETE,
            ("attn", "cross", "mlp", "temporal"),
            time=torch.int64,
            lists=("transformer_blocks", "temporal_transformer_blocks"),
            turns=True,
        ),
        Case(
            "cogvideox",
            cogvideox,
            (3, 4, 8, 8),
            words,
            DISCRETE,
            ("attn", "mlp"),
            always=video_table,
            time=torch.int64,
            order=(0, 1),
        ),
        Case("wan", wan, (4, 3, 8, 8), words, FLOWING, ("attn", "cross", "mlp"), lists=("blocks",)),
        Case(
            "hunyuan-video",
            hunyuan_video,
            (4, 3, 8, 8),
            masked,
            FLOWING,
            ("attn", "mlp"),
            order=(0, 1),
            lists=("transformer_blocks", "single_transformer_blocks"),
        ),
        Case("sana", sana, (4, 4, 4), caption, tuple(t / 2 for t in FLOWING), ("attn", "cross", "mlp")),
    )
}
