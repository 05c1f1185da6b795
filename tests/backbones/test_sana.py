"""What is special about SANA: attention linear in tokens, and positions through a convolution alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Segment
from ditloom.contracts.method import Tap
from ditloom.contracts.streams import Context
from ditloom.parts.linear_attention import LinearAttention, linear_attention
from ditloom.sites.combine import why_not
from ditloom.sites.compiling import compile_blocks
from ditloom.sites.rules import Isolate, rule
from ditloom.sites.surface import Surface
from tests.backbones.tiny import TINY, embedded, inputs, make


@torch.no_grad()
def test_linear_attention_is_the_row_normalised_product() -> None:
    q, k, v = torch.randn(3, 2, 40, 3, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.einsum("bnhd,bmhd->bhnm", q.relu(), k.relu())
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 40))
    expected = torch.einsum("bhnm,bmhd->bnhd", weights, v)
    torch.testing.assert_close(linear_attention(q, k, v), expected, rtol=1e-4, atol=1e-5)
    constant = torch.full_like(v, 0.7)
    torch.testing.assert_close(linear_attention(q, k, constant), constant)


@torch.no_grad()
def test_a_query_without_weight_gives_zero_and_half_precision_sums_in_float32() -> None:
    q, k, v = torch.randn(3, 1, 4096, 2, 8, generator=torch.Generator().manual_seed(0))
    q[:, 3] = -1.0
    y = linear_attention(q, k, v)
    assert not y[:, 3].any()
    assert torch.isfinite(y).all()
    half = linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    exact = linear_attention(*(t.bfloat16().float() for t in (q, k, v)))
    assert half.dtype is torch.bfloat16
    assert torch.equal(half, exact.bfloat16())


def test_its_cost_is_linear_in_tokens() -> None:
    attention = LinearAttention(64, 2)
    assert attention.macs(2048) == 2 * attention.macs(1024) == 8 * attention.macs(256)
    backbone = make("sana")
    layout = embedded(backbone, *inputs(backbone))[0].layout
    assert Surface(backbone, layout).per_pair == [{}] * 3


@torch.no_grad()
def test_only_the_convolution_knows_where_tokens_are() -> None:
    backbone = make("sana")
    streams, context = embedded(backbone, *inputs(backbone))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        out = backbone.run(streams, context)["image"][:, order]
        return backbone.run(streams.updated(image=streams["image"][:, order]), context)["image"], out

    assert not torch.allclose(*both(), atol=1e-3)
    for block in backbone.blocks:
        centre = block.mlp.conv.weight[:, :, 1, 1].clone()
        block.mlp.conv.weight.zero_()
        block.mlp.conv.weight[:, :, 1, 1] = centre
    torch.testing.assert_close(*both(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_masked_text_may_hold_anything() -> None:
    backbone = make("sana")
    x, t, condition = inputs(backbone)
    assert condition.text is not None
    assert condition.text_mask is not None
    other = condition.text.masked_fill(~condition.text_mask[..., None], 7.0)
    y = backbone(x, t, condition)
    torch.testing.assert_close(backbone(x, t, replace(condition, text=other)), y, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(backbone(x, t, replace(condition, text_mask=None))[1:], y[1:], atol=1e-4)


def test_starts_as_published() -> None:
    torch.manual_seed(0)
    backbone = TINY["sana"].build()
    assert torch.equal(backbone.text_norm.weight, torch.full((48,), 0.01))
    assert all(float(p.detach().abs().max()) > 0 for n, p in backbone.named_parameters() if not n.endswith("bias"))
    assert backbone.blocks[0].attn.qkv.bias is None
    assert backbone.blocks[0].mlp.fc2.bias is None
    assert float(backbone.t_embedder.mlp[2].weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_what_it_has_not_is_said() -> None:
    backbone = make("sana")
    x, t, condition = inputs(backbone)
    streams, context = embedded(backbone, x, t, condition)
    with pytest.raises(UserError, match="takes no attention rule"):
        backbone.run(streams, Context(**{**vars(context), "rule": rule(Isolate(("image",)))}))
    surface = Surface(backbone, streams.layout)
    for stage, op, reason in (("attend", "append", "none can be appended"), ("logits", "capture", "never forms")):
        assert reason in why_not(Tap(stage, block=0, op=op), surface)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="takes no segment 'more'"):
        backbone.embed(x, backbone.preset.time.native(t), backbone.prepare(condition), [Segment("more", x)])
    with pytest.raises(UserError, match="width 48 is not a multiple of 5 heads"):
        replace(backbone.preset, heads=5)
    with pytest.raises(UserError, match="width 48 is not a multiple of 7 heads"):
        replace(backbone.preset, cross_heads=7)


@torch.no_grad()
def test_blocks_compile_whole() -> None:
    backbone = make("sana-1.5")
    args = inputs(backbone)
    plain = backbone(*args)
    torch._dynamo.reset()
    compile_blocks(backbone, backend="aot_eager")
    torch.testing.assert_close(backbone(*args), plain, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
