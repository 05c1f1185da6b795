"""A small classifier of Fashion-MNIST, trained by `recipes/fashion_classifier.py` and shipped with the package."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register
from ditloom.data.fashion_mnist import CLASSES
from ditloom.measure.features import Classifier

WEIGHTS = Path(__file__).parents[2] / "assets" / "measure" / "fashion_cnn.safetensors"
WIDTHS = (32, 64, 128, 128)
SIDE = 28
MEAN, STD = 0.2860, 0.3530
"""Of the training pictures' pixels in [0, 1]."""


@register("fashion-cnn")
class FashionCnn(Classifier):
    """Four 3x3 convolutions with two max-pools, then each channel's 7x7 map weighted to one number: 128 features, 10
    logits, 0.25M parameters.

    Batch norms of the training are folded into the convolutions. Pictures are white on black; of those wider than 28
    pixels the centre is taken, of colour pictures the mean channel.
    """

    tag = "fashion-cnn-1"
    classes = CLASSES
    dimension = WIDTHS[-1]

    def __init__(self, weights: Path | None = WEIGHTS):
        super().__init__()
        self.convs = convolutions(bias=True)
        self.out = nn.Linear(WIDTHS[-1], len(CLASSES))
        if weights is not None:
            self.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) < SIDE:
            raise UserError(f"fashion-cnn reads pictures of {SIDE}x{SIDE} or more, got {height}x{width}")
        top, left = (height - SIDE) // 2, (width - SIDE) // 2
        return self.pooled(normalised(images[..., top : top + SIDE, left : left + SIDE]))

    def pooled(self, x: Tensor) -> Tensor:
        """Normalised [B, 1, 28, 28] to [B, 128]."""
        for index, conv in enumerate(self.convs):
            x = relu(conv(x))
            if index < 2:
                x = max_pool2d(x, 2)
        return x.flatten(1)

    def logits(self, features: Tensor) -> Tensor:
        return self.out(features)


def convolutions(bias: bool) -> nn.ModuleList:
    """The 3x3 ones, and last the 7x7 one that sees each channel alone."""
    pairs = zip((1, *WIDTHS), WIDTHS, strict=False)
    last = nn.Conv2d(WIDTHS[-1], WIDTHS[-1], 7, groups=WIDTHS[-1], bias=bias)
    return nn.ModuleList([*(nn.Conv2d(i, o, 3, padding=1, bias=bias) for i, o in pairs), last])


def normalised(images: Tensor) -> Tensor:
    """uint8 [B, 1 or 3, H, W] to float32 [B, 1, H, W] of zero mean and unit variance over the training set."""
    grey = images.to(torch.float32).mean(1, keepdim=True) / 255
    return (grey - MEAN) / STD
