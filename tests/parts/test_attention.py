"""The kernels, attention under rules, and one softmax over several streams."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Span
from ditloom.contracts.streams import Context
from ditloom.parts.attention import Projections, attend, kernel, logits
from ditloom.parts.joint import joint_attention, joint_macs, within
from ditloom.sites.rules import Isolate, Only, Padding, Rule, Term, rule, settle

LAYOUT = Layout((Span("image", 6), Span("reference", 2), Span("text", 4, "text")), (2, 3))
N = 12


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, N, 3, 8, generator=g).to(dtype) for _ in range(3))
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double()).float()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_kernel(dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = qkv(dtype)
    mask = torch.rand(2, N, N, generator=torch.Generator().manual_seed(1)) > 0.3
    mask |= torch.eye(N, dtype=torch.bool)
    for m in (None, mask):
        out = kernel(q, k, v, None if m is None else m[:, None])
        assert out.dtype is dtype
        torch.testing.assert_close(out.float(), by_hand(q, k, v, m), rtol=tolerance, atol=tolerance)
    scores = logits(q, k).float()
    expected = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / math.sqrt(8)
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance)


def test_padding_is_not_seen() -> None:
    q, k, v = qkv()
    gate = torch.tensor([[True, True, False, False], [True, True, True, True]])
    mask = torch.ones(2, N, N, dtype=torch.bool)
    mask[:, :, 8:] = gate[:, None]
    out = attend(q, k, v, LAYOUT, rule(Padding()), {"text_mask": gate})
    torch.testing.assert_close(out, by_hand(q, k, v, mask).flatten(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "masks", [(Isolate(("reference",)),), (Only(("image",), ("image", "text")), Isolate(("text",)))]
)
def test_whole_segments_are_split_exactly(masks: tuple[Isolate | Only, ...]) -> None:
    q, k, v = qkv()
    settled, gates = settle(rule(*masks), LAYOUT, {})
    assert settled.plans[0].kind == "split"
    spans = {name: LAYOUT.joint_slice(name) for name in ("image", "reference", "text")}
    mask = torch.zeros(1, N, N, dtype=torch.bool)
    for a, at in spans.items():
        for b, to in spans.items():
            mask[:, at, to] = min(m.pair(a, b) for m in masks) > 0
    out = attend(q, k, v, LAYOUT, settled, gates)
    torch.testing.assert_close(out, by_hand(q, k, v, mask).flatten(2), rtol=1e-5, atol=1e-5)


def test_a_weighted_sum_of_attentions() -> None:
    q, k, v = qkv()
    gate = torch.rand(2, N, generator=torch.Generator().manual_seed(2))
    mixed = Rule((Term((), weight=0.25), Term((Isolate(("text",)),), weight="share")))
    out = attend(q, k, v, LAYOUT, mixed, {"share": gate})
    alone = attend(q, k, v, LAYOUT, rule(Isolate(("text",))))
    torch.testing.assert_close(out, 0.25 * attend(q, k, v, LAYOUT) + gate[..., None] * alone, rtol=1e-5, atol=1e-5)


def test_projections_order_and_norms() -> None:
    p = Projections(24, 3, qk_norm="rms")
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(3))
    q, k, v = p.heads_of(x, None)
    torch.testing.assert_close(q.square().mean(-1), torch.ones(2, 5, 3), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(v.flatten(2), p.qkv(x)[..., 48:])
    assert k.shape == (2, 5, 3, 8)
    assert p.macs(5) == 5 * 4 * 24 * 24
    assert not hasattr(Projections(24, 3, project_out=False), "proj")
    with pytest.raises(UserError, match="not a multiple of 5 heads"):
        Projections(24, 5)


def streams() -> tuple[dict[str, Projections], dict[str, Tensor]]:
    torch.manual_seed(4)
    h = {"image": torch.randn(2, 8, 24), "text": torch.randn(2, 4, 24)}
    return {name: Projections(24, 3) for name in h}, h


@torch.no_grad()
def test_equal_weights_make_a_joint_attention_an_ordinary_one() -> None:
    projections, h = streams()
    projections["text"].load_state_dict(projections["image"].state_dict())
    out = joint_attention(projections, h, LAYOUT, Context())
    one = projections["image"]
    whole = one.out(kernel(*one.heads_of(torch.cat([h["image"], h["text"]], 1), None)).flatten(2))
    torch.testing.assert_close(torch.cat([out["image"], out["text"]], 1), whole, rtol=1e-5, atol=1e-6)
    assert joint_macs(projections, LAYOUT) == one.macs(N) + 2 * N * N * 24
    assert list(joint_attention(projections, h, LAYOUT, Context(), outputs=("image",))) == ["image"]


@pytest.mark.parametrize(
    ("chosen", "kind"),
    [
        (rule(Padding()), "none"),
        (rule(Isolate(("reference",))), "dense"),
        (Isolate(("reference",)) & Padding("reference", "some"), "dense"),
    ],
)
@torch.no_grad()
def test_a_rule_inside_one_stream(chosen: Rule, kind: str) -> None:
    projections, h = streams()
    gates = {"text_mask": torch.ones(2, 4, dtype=torch.bool), "some": torch.tensor([[True, False], [True, True]])}
    alone = Layout(LAYOUT.of("image"), LAYOUT.grid)
    settled, made = settle(chosen, LAYOUT, gates)
    inner = within(Context(rule=settled, gates=dict(made)), LAYOUT, "image")
    assert inner.rule.plans[0].kind == kind
    image = {"image": projections["image"]}
    out = joint_attention(image, {"image": h["image"]}, alone, inner)["image"]
    expected = joint_attention(image, {"image": h["image"]}, alone, Context(rule=chosen, gates=gates))["image"]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert within(Context(), LAYOUT, "image").rule is None
    assert isinstance(image["image"], nn.Module)
