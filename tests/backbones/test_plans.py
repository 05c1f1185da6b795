"""Every block of every family under plans: captures, edits, reuse, rows, mixes, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.plan import Action, BlockPlan, Edit
from ditloom.sites.compiling import compile_blocks
from ditloom.sites.visit import COSTLY
from tests.backbones.tiny import TINY, embedded, inputs, make, of_kind, planned


@pytest.fixture(params=list(TINY))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return make(request.param)


def both(backbone: Backbone, plans: Any) -> tuple[Tensor, dict[int, dict[str, Any]]]:
    return planned(backbone, *inputs(backbone), plans)


def names(backbone: Backbone, index: int) -> list[str]:
    block = backbone.blocks[index]
    return [*block.stages, *block.sites]


def block_with(backbone: Backbone, site: str, *, rows: bool = False) -> int:
    """The second block with a site (the only one, where there is one), or a skip."""
    found = [i for i in of_kind(backbone, site) if not rows or site in backbone.blocks[i].row_sites]
    if not found:
        pytest.skip(f"{backbone.preset.family} has no site {site!r}{' with rows' if rows else ''}")
    return found[min(1, len(found) - 1)]


@torch.no_grad()
def test_the_loop_is_the_forward(backbone: Backbone) -> None:
    assert torch.equal(both(backbone, {})[0], backbone(*inputs(backbone)))


@torch.no_grad()
def test_capturing_every_stage_changes_nothing_and_putting_it_back_neither(backbone: Backbone) -> None:
    plain = backbone(*inputs(backbone))
    streams = embedded(backbone, *inputs(backbone))[0].layout.streams
    keep = {i: (BlockPlan(keep=_asked(backbone, i, streams)), {}) for i in range(len(backbone.blocks))}
    captured, kept = both(backbone, keep)
    assert torch.equal(captured, plain)
    back = {}
    for i, found in kept.items():
        assert {f"{name}@image" for name in names(backbone, i) if name not in COSTLY} - found.keys() <= {
            "mlp_text@image"
        }
        given = {k: v for k, v in found.items() if "@" in k}
        edits = tuple(Edit(k.split("@")[0], "replace", k, k.split("@")[1]) for k in given)
        back[i] = (BlockPlan(edits=edits), given)
    assert torch.equal(both(backbone, back)[0], plain)


def _asked(backbone: Backbone, index: int, streams: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}@{s}" for name in names(backbone, index) if name not in COSTLY for s in streams)


@torch.no_grad()
def test_every_stage_is_heard(backbone: Backbone) -> None:
    """Adding noise at any one stage of the first block changes the output."""
    first = of_kind(backbone)[0]
    plain, kept = both(backbone, {first: (BlockPlan(keep=_asked(backbone, first, ("image",))), {})})
    for key, value in kept[first].items():
        edit = Edit(key.removesuffix("@image"), "add", "noise")
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        out, _ = both(backbone, {first: (BlockPlan(edits=(edit,)), {"noise": noise})})
        assert not torch.allclose(out, plain, atol=1e-4), key


@torch.no_grad()
def test_logits_are_those_of_the_attention(backbone: Backbone) -> None:
    found = [i for i in of_kind(backbone, "attn") if "logits" in backbone.blocks[i].stages]
    if not found:
        pytest.skip(f"{backbone.preset.family} has no softmax attention with logits")
    at, streams = found[0], embedded(backbone, *inputs(backbone))[0].layout.streams
    keep = ("logits", *(f"{k}@{s}" for k in ("v_proj", "attn_heads") for s in streams))
    _, every = planned(backbone, *inputs(backbone, masked=False), {at: (BlockPlan(keep=keep), {})})
    kept = every[at]
    v = torch.cat([kept[f"v_proj@{s}"] for s in streams if f"v_proj@{s}" in kept], 1)
    heads = torch.cat([kept[f"attn_heads@{s}"] for s in streams if f"attn_heads@{s}" in kept], 1)
    again = torch.einsum("bhqk,bkhd->bqhd", kept["logits"].softmax(-1), v).flatten(2)
    torch.testing.assert_close(again, heads, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_logits_of_text_are_those_of_the_cross_attention(backbone: Backbone) -> None:
    at, keep = block_with(backbone, "cross"), ("cross_logits", "cross_v@image", "cross_heads@image")
    if "cross_logits" not in backbone.blocks[at].stages:
        pytest.skip(f"{backbone.preset.family} has no logits of text")
    kept = both(backbone, {at: (BlockPlan(keep=keep), {})})[1][at]
    again = torch.einsum("bhqk,bkhd->bqhd", kept["cross_logits"].softmax(-1), kept["cross_v@image"]).flatten(2)
    torch.testing.assert_close(again, kept["cross_heads@image"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_reusing_what_was_kept_changes_nothing_and_saves_its_cost(backbone: Backbone) -> None:
    plain = backbone(*inputs(backbone))
    layouts = [embedded(backbone, *inputs(backbone))[0].layout]
    for block in backbone.blocks:
        layouts.append(block.after(layouts[-1]))
    full, blocks = macs_of(backbone, {}), of_kind(backbone)
    for i in (blocks[0], blocks[-1]):
        block, layout = backbone.blocks[i], layouts[i]
        for site in block.sites:
            _, kept = both(backbone, {i: (BlockPlan(keep=(site,)), {})})
            plan = {i: (BlockPlan(actions=((site, Action.REUSE),)), {site: kept[i][site]})}
            assert torch.equal(both(backbone, plan)[0], plain), (i, site)
            assert full - macs_of(backbone, plan) == 3 * block.macs(layout)[site], (i, site)


def macs_of(backbone: Backbone, plans: Any) -> int:
    # the fused CPU kernel is not known to the counter; its explicit form is
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        both(backbone, plans)
    return counter.get_total_flops() // 2


@torch.no_grad()
def test_skipping_a_site_is_reusing_zero(backbone: Backbone) -> None:
    plain = backbone(*inputs(backbone))
    at = of_kind(backbone)[1]
    for site in backbone.blocks[at].sites:
        _, kept = both(backbone, {at: (BlockPlan(keep=(site,)), {})})
        zero = torch.utils._pytree.tree_map(torch.zeros_like, kept[at][site])
        skipped = both(backbone, {at: (BlockPlan(actions=((site, Action.SKIP),)), {})})[0]
        assert torch.equal(both(backbone, {at: (BlockPlan(actions=((site, Action.REUSE),)), {site: zero})})[0], skipped)
        assert not torch.equal(skipped, plain)


@pytest.mark.parametrize("site", ["mlp", "cross"])
@torch.no_grad()
def test_rows_computed_afresh(backbone: Backbone, site: str) -> None:
    """All rows: the plain output. Some rows: those are fresh, the others as stored."""
    at, name = block_with(backbone, site, rows=True), f"{site}.rows"
    plain, kept = both(backbone, {at: (BlockPlan(keep=(site,)), {})})
    fresh = kept[at][site]
    every = torch.stack([torch.randperm(fresh.shape[1], generator=torch.Generator().manual_seed(i)) for i in range(3)])
    rows = BlockPlan(actions=((site, Action.ROWS),), keep=(site,))
    out, _ = both(backbone, {at: (rows, {site: torch.zeros_like(fresh), name: every})})
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    _, some = both(backbone, {at: (rows, {site: torch.zeros_like(fresh), name: every[:, :5]})})
    chosen = torch.zeros(fresh.shape[:2], dtype=torch.bool).scatter(1, every[:, :5], True)
    torch.testing.assert_close(some[at][site][chosen], fresh[chosen], rtol=1e-5, atol=1e-5)
    assert not some[at][site][~chosen].any()


@torch.no_grad()
def test_a_mix_is_between_computed_and_stored(backbone: Backbone) -> None:
    at = of_kind(backbone)[1]
    site = backbone.blocks[at].sites[0]
    plain, kept = both(backbone, {at: (BlockPlan(keep=(site,)), {})})
    stored = torch.utils._pytree.tree_map(lambda v: 2 * v, kept[at][site])
    for weight, expected in ((1.0, kept[at][site]), (0.0, stored)):
        given = {site: stored, f"{site}.mix": torch.tensor(weight)}
        mix = both(backbone, {at: (BlockPlan(actions=((site, Action.MIX),)), given)})[0]
        reuse = {at: (BlockPlan(actions=((site, Action.REUSE),)), {site: expected})}
        torch.testing.assert_close(mix, both(backbone, reuse)[0])
    assert torch.isfinite(plain).all()


@torch.no_grad()
def test_counted_macs_are_the_executed_ones(backbone: Backbone) -> None:
    x, t, condition = inputs(backbone, batch=1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        backbone(x, t, condition)
    layout = embedded(backbone, x, t, condition)[0].layout
    assert counter.get_total_flops() == 2 * backbone.macs(layout)


@torch.no_grad()
def test_a_probe_costs_what_it_says(backbone: Backbone) -> None:
    streams, context = embedded(backbone, *inputs(backbone))
    first = backbone.blocks[of_kind(backbone)[0]].requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        first.modulated_in(streams, context)
    assert counter.get_total_flops() == 2 * 3 * first.modulated_in_macs(streams.layout)


@pytest.mark.parametrize(
    "name",
    [
        "lightning-dit",
        "u-vit-text",
        "mmdit-dual",
        "pixart-sigma-compressed",
        "hunyuan-dit",
        "flux",
        "latte-text",
        "wan",
        "stdit",
    ],
)
def test_compiled_blocks_compute_the_same_in_one_graph_per_kind(name: str) -> None:
    backbone = make(name)
    args = inputs(backbone)
    plain = backbone(*args)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in backbone.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(backbone(*args), plain, rtol=1e-5, atol=1e-5)
    kinds = len({type(block) for block in backbone.blocks})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == kinds
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_by_inductor_too(backbone: Backbone) -> None:
    args = inputs(backbone)
    plain = backbone(*args)
    torch._dynamo.reset()
    compile_blocks(backbone)
    torch.testing.assert_close(backbone(*args), plain, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
