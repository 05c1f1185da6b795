"""Tiny pipelines of diffusers with random weights: prompts are handed in as embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ditloom.contracts.clock import Clock, Rows
from ditloom.contracts.method import Tap
from tests.adapters.tiny import drawer, made
from tests.sites.walkthroughs import Captures


@dataclass(frozen=True)
class PipeCase:
    """A pipeline and one call of it. guided: how its guidance is switched; apart: one call per branch."""

    name: str
    make: Callable[[], Any]
    call: Callable[..., Any]
    off: dict[str, Any]
    apart: bool = False
    rows: tuple[str, ...] = ("uncond", "cond")

    @property
    def pipe(self) -> Any:
        """The pipeline, made once."""
        return assembled(self.name)

    def run(self, steps: int = 6, seed: int = 0, **more: Any) -> torch.Tensor:
        """What it draws."""
        generator = torch.Generator().manual_seed(seed)
        return self.call(self.pipe, num_inference_steps=steps, generator=generator, **more)


@cache
def assembled(name: str) -> Any:
    pipe = PIPES[name].make()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit() -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return DiTPipeline(transformer=made("dit"), vae=vae.eval(), scheduler=DDIMScheduler())


def call_dit(pipe: Any, guidance_scale: float = 4.0, **more: Any) -> Any:
    return pipe(class_labels=[3, 7], guidance_scale=guidance_scale, output_type="pt", **more).images


def pixart() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    scheduler = DPMSolverMultistepScheduler()
    return PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=made("pixart"), scheduler=scheduler
    )


def call_pixart(pipe: Any, guidance_scale: float = 4.0, **more: Any) -> Any:
    draw = drawer(5)
    mask = torch.ones(2, 6)
    return pipe(
        negative_prompt=None,
        prompt_embeds=draw(2, 6, 12),
        prompt_attention_mask=mask,
        negative_prompt_embeds=draw(2, 6, 12),
        negative_prompt_attention_mask=mask,
        guidance_scale=guidance_scale,
        height=64,
        width=64,
        use_resolution_binning=False,
        output_type="latent",
        **more,
    ).images


def sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    parts = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    return StableDiffusion3Pipeline(
        transformer=made("sd3"), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts
    )


def call_sd3(pipe: Any, guidance_scale: float = 4.0, **more: Any) -> Any:
    draw = drawer(5)
    return pipe(
        prompt_embeds=draw(2, 6, 12),
        pooled_prompt_embeds=draw(2, 10),
        negative_prompt_embeds=draw(2, 6, 12),
        negative_pooled_prompt_embeds=draw(2, 10),
        guidance_scale=guidance_scale,
        height=64,
        width=64,
        output_type="latent",
        **more,
    ).images


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FluxPipeline(transformer=made("flux"), scheduler=scheduler, **parts)


def call_flux(pipe: Any, true_cfg_scale: float = 2.0, **more: Any) -> Any:
    draw = drawer(5)
    return pipe(
        prompt_embeds=draw(2, 6, 12),
        pooled_prompt_embeds=draw(2, 10),
        negative_prompt_embeds=draw(2, 6, 12),
        negative_pooled_prompt_embeds=draw(2, 10),
        true_cfg_scale=true_cfg_scale,
        height=64,
        width=64,
        output_type="latent",
        **more,
    ).images


def wan() -> Any:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    return WanPipeline(transformer=made("wan"), scheduler=scheduler, **parts)


def call_wan(pipe: Any, guidance_scale: float = 4.0, **more: Any) -> Any:
    draw = drawer(5)
    return pipe(
        prompt_embeds=draw(1, 6, 12),
        negative_prompt_embeds=draw(1, 6, 12),
        guidance_scale=guidance_scale,
        height=64,
        width=64,
        num_frames=9,
        output_type="latent",
        **more,
    ).frames


def cogvideox() -> Any:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    return CogVideoXPipeline(transformer=made("cogvideox"), scheduler=scheduler, **parts)


def call_cogvideox(pipe: Any, guidance_scale: float = 4.0, **more: Any) -> Any:
    draw = drawer(5)
    return pipe(
        prompt_embeds=draw(1, 6, 12),
        negative_prompt_embeds=draw(1, 6, 12),
        guidance_scale=guidance_scale,
        height=64,
        width=64,
        num_frames=9,
        output_type="latent",
        **more,
    ).frames


class Clocks(Captures):
    """Notes the clock and the rows of every forward."""

    def __init__(self) -> None:
        super().__init__([Tap("block_in", 0)], key="clocks")
        self.clocks: list[Clock] = []
        self.rows: list[tuple[str, ...]] = []

    def captured(self, tap: Tap, value: Any, clock: Clock, rows: Rows) -> None:
        self.clocks.append(clock)
        self.rows.append(rows.branches)


PIPES = {
    case.name: case
    for case in (
        PipeCase("dit", dit, call_dit, {"guidance_scale": 1.0}, rows=("cond", "uncond")),
        PipeCase("pixart", pixart, call_pixart, {"guidance_scale": 1.0}),
        PipeCase("sd3", sd3, call_sd3, {"guidance_scale": 1.0}),
        PipeCase("flux", flux, call_flux, {"true_cfg_scale": 1.0}, apart=True),
        PipeCase("wan", wan, call_wan, {"guidance_scale": 1.0}, apart=True),
        PipeCase("cogvideox", cogvideox, call_cogvideox, {"guidance_scale": 1.0}),
    )
}
