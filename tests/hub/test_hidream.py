"""diffusers' HiDreamImageTransformer2DModel side by side, in both directions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.backbones.hidream import PRESETS, HiDreamConfig
from ditloom.contracts.condition import Condition
from ditloom.hub.checkpoint import load_foreign, save_foreign
from ditloom.parts.patches import patchify
from ditloom.parts.positions import grid_positions, with_axes
from tests.hub.test_diffusers import T, close, latent, randomised

diffusers = pytest.importorskip("diffusers")

LAYERS = (0, 2, 1, 3, 3)
CONFIG = HiDreamConfig(
    depth=2,
    single_depth=3,
    width=96,
    heads=4,
    channels=4,
    image_size=8,
    text_width=32,
    text_tokens=6,
    llama_width=16,
    llama_tokens=5,
    layers=LAYERS,
    pooled_width=20,
    axes=(12, 4, 8),
)


def their_hidream(**more: Any) -> Any:
    settings: dict[str, Any] = {
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 24,
        "num_attention_heads": 4,
        "caption_channels": [32, 16],
        "text_emb_dim": 20,
        "axes_dims_rope": (12, 4, 8),
        "max_resolution": (8, 8),
        "llama_layers": list(LAYERS),
    }
    return randomised(diffusers.HiDreamImageTransformer2DModel(**{**settings, **more}))


def text(rows: int = 3) -> Condition:
    g = torch.Generator().manual_seed(1)
    llama = torch.randn(rows, 4, 5, 16, generator=g)
    tokens, pooled = torch.randn(rows, 6, 32, generator=g), torch.randn(rows, 20, generator=g)
    return Condition(text=tokens, pooled=pooled, extra={"llama": llama})


def run(theirs: Any, x: Tensor, condition: Condition, t: Tensor = T) -> Tensor:
    """Packed by hand where it is not square: the published padding adds keys of zero, which other sizes do not have."""
    grid = (x.shape[-2] // 2, x.shape[-1] // 2)
    square = {"hidden_states": x}
    packed = patchify(x, 2).unflatten(-1, (4, 4)).mT.flatten(2)  # (channel, row, column) to (row, column, channel)
    rows = len(x)
    by_hand = {
        "hidden_states": packed,
        "hidden_states_masks": torch.ones(rows, packed.shape[1]),
        "img_ids": with_axes(grid_positions(*grid), 3).float().expand(rows, -1, -1),
        "img_sizes": torch.tensor([grid] * rows),
    }
    return theirs(
        **(square if grid[0] == grid[1] else by_hand),
        timesteps=1000 * t,
        encoder_hidden_states_t5=condition.text,
        encoder_hidden_states_llama3=condition.extra["llama"].transpose(0, 1),
        pooled_embeds=condition.pooled,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("more", [{}, {"num_routed_experts": 6, "num_activated_experts": 3}], ids=["4-2", "6-3"])
@torch.no_grad()
def test_from_diffusers(more: dict[str, Any], tmp_path: Path) -> None:
    theirs = their_hidream(**more)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_foreign(tmp_path / "theirs")
    assert ours.preset.layers == LAYERS
    for size in [(8, 8), (6, 10), (12, 12)]:
        y = run(theirs, latent(*size), text())
        assert float(y.std()) > 0.1
        close(-ours(latent(*size), T, text()), y)  # theirs points to the data


@torch.no_grad()
def test_to_diffusers(tmp_path: Path) -> None:
    config = replace(CONFIG, experts=5, top_k=1, width=64, axes=(4, 8, 4))
    ours = randomised(config.build())
    path = save_foreign(ours, "hidream", tmp_path / "ours")
    theirs = diffusers.HiDreamImageTransformer2DModel.from_pretrained(path).eval()
    close(-ours(latent(6, 10), T, text()), run(theirs, latent(6, 10), text()))
    again = load_foreign(tmp_path / "ours")
    sizes = {name: getattr(config, name) for name in ("image_size", "text_tokens", "llama_tokens")}
    assert replace(again.preset, **sizes) == config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


@torch.no_grad()
def test_masked_text_is_text_that_is_not_there(tmp_path: Path) -> None:
    theirs = their_hidream()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, full = load_foreign(tmp_path / "theirs"), text()
    lengths = [(6, 5), (4, 1), (1, 3)]
    mask, llama_mask = (
        torch.arange(n)[None] < torch.tensor([a[k] for a in lengths])[:, None] for k, n in ((0, 6), (1, 5))
    )
    y = ours(latent(), T, replace(full, text_mask=mask, extra={**full.extra, "llama_mask": llama_mask}))
    for i, (n, m) in enumerate(lengths):
        row = full.rows(slice(i, i + 1))
        assert row.text is not None
        short = replace(row, text=row.text[:, :n], extra={"llama": row.extra["llama"][:, :, :m]})
        close(-y[i : i + 1], run(theirs, latent()[i : i + 1], short, T[i : i + 1]))


def test_the_published_size_is_diffusers_shapes() -> None:
    from ditloom.hub.formats.hidream import HiDreamFormat

    config = PRESETS["HiDream-I1"]
    settings = {k: v for k, v in HiDreamFormat().settings(config).items() if k != "_class_name"}
    with torch.device("meta"):
        theirs = diffusers.HiDreamImageTransformer2DModel(**settings).state_dict()
        ours = HiDreamFormat.keymap.out(config.build().state_dict(), config)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
