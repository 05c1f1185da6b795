"""A model small enough that a picture takes milliseconds."""

from __future__ import annotations

from typing import Any

import torch

from ditloom.loading import assemble
from ditloom.model import Model

CLASSES = ("ant", "bee", "ankle boot")


def tiny(**changes: Any) -> Model:
    """A class-conditional DiT on 16x16 grey pictures with random weights everywhere."""
    backbone = {"family": "dit", "depth": 2, "width": 32, "heads": 2, "patch": 4, "image_size": 16, "channels": 1}
    config: dict[str, Any] = {
        "backbone": {**backbone, "classes": len(CLASSES), "learn_sigma": False},
        "process": {"name": "linear", "predicts": "v"},
        "latents": {"name": "pixels", "channels": 1},
        "conditioner": {"name": "labels", "names": list(CLASSES)},
        "sampling": {"steps": 3},
        "info": {"name": "tiny"},
    }
    torch.manual_seed(0)
    model = assemble({**config, **changes})
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
