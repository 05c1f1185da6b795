"""What is special about DiT-Air: one set of weights for text and image, and what its blocks share."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from ditloom.backbones.dit_air import PRESETS, DiTAirConfig
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Segment
from tests.backbones.tiny import TINY, embedded, inputs, make

LAW = {  # in units of N^2 of the width: (adaLN, attention, MLP)
    "DiT-Air/B": lambda n: 12 + 4 * n + 8 * n,
    "DiT-Air/B-lite-attention": lambda n: 12 + 4 + 8 * n,
    "DiT-Air/B-lite-full": lambda n: 12 + 4 + 8,
    "MMDiT/B": lambda n: 12 * n + 8 * n + 16 * n,
    "MMDiT/B-shared-AdaLN": lambda n: 12 + 8 * n + 16 * n,
}


@pytest.mark.parametrize("name", LAW)
def test_block_weights_follow_the_papers_table(name: str) -> None:
    """Matrices only; d = 64 N."""
    config = PRESETS[name]
    assert config.width == 64 * config.depth
    with torch.device("meta"):
        backbone: Any = config.build()
    held = {*backbone.blocks.parameters(), *backbone.shared.parameters()}
    assert sum(p.numel() for p in held if p.ndim == 2) == LAW[name](config.depth) * config.width**2
    assert sum(p.numel() for p in held) == sum(p.numel() for n, p in backbone.named_parameters() if _inside(n))


def _inside(name: str) -> bool:
    return name.startswith(("blocks.", "shared."))


def test_the_papers_differences_are_reproduced() -> None:
    """902M - 631M and 321M - 230M: what sharing saves does not depend on what surrounds the blocks."""
    with torch.device("meta"):
        counts = {name: config.build().learned_parameters() for name, config in PRESETS.items()}
    assert counts["MMDiT/B"] - counts["MMDiT/B-shared-AdaLN"] == pytest.approx(271e6, abs=0.5e6)
    assert counts["DiT-Air/B"] - counts["DiT-Air/B-lite-attention"] == pytest.approx(91e6, abs=1e6)


def untied(backbone: Any) -> Any:
    """The same network with a copy of every shared part in every block."""
    twin = replace(backbone.preset, tied=()).build().eval()
    state, theirs = dict(backbone.state_dict()), twin.state_dict()
    for name in theirs:
        if name not in state:
            _, _, rest = name.split(".", 2)
            part, _, leaf = rest.partition(".")
            state[name] = state[f"shared.{part}.{leaf}"]
    twin.load_state_dict({name: state[name] for name in theirs}, strict=True)
    return twin


@pytest.mark.parametrize("name", ["dit-air", "dit-air-lite"])
def test_a_tied_model_is_an_untied_one_with_copies(name: str) -> None:
    backbone: Any = make(name)
    twin, args = untied(backbone), inputs(backbone)
    y, z = backbone(*args), twin(*args)
    assert torch.equal(y, z)
    layout = embedded(backbone, *args)[0].layout
    assert backbone.macs(layout) == twin.macs(layout)
    assert twin.learned_parameters() > backbone.learned_parameters()
    y.square().sum().backward()
    z.square().sum().backward()
    for part, module in backbone.shared.items():
        for leaf, p in module.named_parameters():
            copies = [block.get_submodule(part).get_parameter(leaf).grad for block in twin.blocks]
            torch.testing.assert_close(p.grad, torch.stack(copies).sum(0), rtol=1e-4, atol=1e-4)


def test_a_shared_part_is_stored_once_and_stays_shared() -> None:
    backbone: Any = make("dit-air-lite")
    state = backbone.state_dict()
    assert sum("attn.qkv.weight" in name for name in state) == 1
    assert save(state)  # which refuses tensors that share memory
    twin = copy.deepcopy(backbone)
    assert len({id(block.attn) for block in twin.blocks}) == 1
    assert twin.blocks[0].attn is twin.shared["attn"]
    assert twin.blocks[0].attn is not backbone.blocks[0].attn
    twin.to(torch.float64)
    assert twin.blocks[2].mlp.fc1.weight.dtype is torch.float64


@torch.no_grad()
def test_text_and_image_are_told_apart_by_their_halves_of_the_modulation() -> None:
    backbone: Any = make("dit-air")
    args = inputs(backbone)
    y, halves = backbone(*args), backbone.shared["modulation"]
    image, text = (copy.deepcopy(halves[s].state_dict()) for s in ("image", "text"))
    halves["image"].load_state_dict(text)
    halves["text"].load_state_dict(image)
    assert not torch.allclose(backbone(*args), y, atol=1e-3)
    halves["text"].load_state_dict(text)
    equal = backbone(*args)
    halves["image"], halves["text"] = halves["text"], halves["image"]
    assert torch.equal(backbone(*args), equal)


@pytest.mark.parametrize("weights", ["image", "text"])
@torch.no_grad()
def test_a_segment_is_heard_with_the_time_it_asks_for(weights: str) -> None:
    backbone: Any = make("dit-air")
    x, t, condition = inputs(backbone, masked=False)
    tokens = x.flip(0) if weights == "image" else torch.randn(3, 2, 96)
    memory, native = backbone.prepare(condition), backbone.preset.time.native(t)
    outs = []
    for more in ({}, {"modulation": "zero"}, {"modulation": "own", "time": torch.zeros(3)}):
        streams, context = backbone.embed(x, native, memory, [Segment("added", tokens, weights=weights, **more)])
        outs.append(backbone.head(backbone.run(streams, context), context))
    assert not torch.allclose(outs[1], outs[0], atol=1e-4)
    torch.testing.assert_close(outs[2], outs[1], rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_said_at_construction() -> None:
    with pytest.raises(UserError, match="did you mean 'attn'"):
        DiTAirConfig(depth=2, width=64, heads=4, tied=("atn",))
    with pytest.raises(UserError, match="not a multiple of 5 heads"):
        DiTAirConfig(depth=2, width=64, heads=5)
    assert TINY["dit-air"].tied == ("modulation",)
