"""How close pictures are to reference pictures, pair by pair: PSNR and SSIM after rounding to 8 bits.

Used to hold an accelerated model against its own full run at equal seeds. Fidelity is not quality: a faster run may
draw another picture that is as good.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from ditloom.contracts.errors import UserError

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio 10 log10(1 / MSE) in dB, [B]; infinite for equal pictures.

    Pictures are [B, C, H, W], uint8 or in [0, 1]; the latter are rounded to 8 bits first.
    """
    a, b = _pair(images, reference)
    return -10 * (a - b).square().mean((1, 2, 3)).log10()


def latent_psnr(x: Tensor, reference: Tensor) -> float:
    """PSNR of latents in dB, over all of a batch at once, with the reference's own range as the peak."""
    span = float(reference.max() - reference.min())
    return 10 * float((span**2 / (x - reference).square().mean()).log10())


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, equation 13), [B]: Gaussian window of 11 pixels, sigma 1.5, range 1.

    The mean over channels and over the places where the whole window lies inside; inputs as for `psnr`.
    """
    a, b = _pair(images, reference)
    if min(a.shape[-2:]) < WINDOW:
        raise UserError(f"SSIM needs pictures of at least {WINDOW} pixels, got {a.shape[-2]}x{a.shape[-1]}")
    mean_a, mean_b, square_a, square_b, product = (_blurred(x) for x in (a, b, a * a, b * b, a * b))
    variances = square_a - mean_a**2 + square_b - mean_b**2
    covariance = product - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    structure = (2 * covariance + K2**2) / (variances + K2**2)
    return (luminance * structure).mean((1, 2, 3))


def to_unit(images: Tensor) -> Tensor:
    """uint8, or floats in [0, 1] rounded to 8 bits, to float64 in [0, 1]."""
    if images.dtype == torch.uint8:
        return images.double() / 255
    return (images.double().clamp(0, 1) * 255).round() / 255


def _pair(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if images.shape != reference.shape or images.ndim != 4:
        raise UserError(f"expected two equal batches [B, C, H, W], got {list(images.shape)}, {list(reference.shape)}")
    return to_unit(images), to_unit(reference)


def _blurred(x: Tensor) -> Tensor:
    """Gaussian mean of each channel over the window, without padding."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SIGMA**2))
    window = (window / window.sum()).expand(x.shape[1], 1, 1, WINDOW)
    rows = conv2d(x, window, groups=x.shape[1])
    return conv2d(rows, window.transpose(2, 3), groups=x.shape[1])
