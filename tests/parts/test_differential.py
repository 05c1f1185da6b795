"""Differential attention against its defining equations, map by map; and as a kind in several families."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.backbones.dit import DiTConfig
from ditloom.backbones.lightning_dit import LightningDiTConfig
from ditloom.backbones.skip_dit import SkipDiTConfig
from ditloom.backbones.u_vit import UViTConfig
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.layout import Layout, Segment, Span
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.streams import Context
from ditloom.hub.checkpoint import save_foreign
from ditloom.parts.attention import SelfAttention
from ditloom.parts.attention_kinds import KINDS, self_attention
from ditloom.parts.differential import DiffAttention, DintAttention
from ditloom.sites.rules import Isolate, rule, settle, with_padding
from tests.backbones.portrait import LATENT, ODD_HEAD, TEXT
from tests.backbones.tiny import embedded, inputs

N, WIDTH, HEADS, SIZE = 7, 32, 4, 8
LAYOUT = Layout((Span("image", N),), (1, N))


def made(kind: str, layer: int = 2, **more: Any) -> Any:
    attention = self_attention(kind, WIDTH, HEADS, layer, **more)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in attention.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return attention


def tokens(batch: int = 3) -> Tensor:
    return torch.randn(batch, N, WIDTH, generator=torch.Generator().manual_seed(0))


def maps(attention: DiffAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """A1 and A2 [B, heads / 2, N, N], written out."""
    q, k, _ = attention.qkv(x).unflatten(-1, (3, HEADS // 2, 2, SIZE)).unbind(2)
    logits = torch.einsum("bqhid,bkhid->bihqk", q, k) / math.sqrt(SIZE)
    first, second = logits.softmax(-1).unbind(1)
    return first, second


def explicit(attention: DiffAttention, x: Tensor, a: Tensor) -> Tensor:
    """The output for a map A: the head norm over 2 d features of A v, then the projection."""
    v = attention.qkv(x).unflatten(-1, (3, HEADS // 2, 2 * SIZE))[:, :, 2]
    heads = torch.einsum("bhqk,bkhd->bqhd", a, v)
    normed = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + 1e-5) * attention.head_norm.weight
    return attention.proj((attention.scale * normed).flatten(2))


@torch.no_grad()
def test_diff_is_the_difference_of_two_maps() -> None:
    attention, x = made("diff"), tokens()
    first, second = maps(attention, x)
    a = first - attention.strength() * second
    torch.testing.assert_close(a.sum(-1), (1 - attention.strength()).expand(3, 2, N), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attention(x, LAYOUT, Context()), explicit(attention, x, a), rtol=1e-5, atol=1e-5)
    assert attention.scale == pytest.approx(1 - (0.8 - 0.6 * math.exp(-0.6)))


@torch.no_grad()
def test_dint_adds_the_column_means_and_its_rows_sum_to_one() -> None:
    attention, x = made("dint"), tokens()
    first, second = maps(attention, x)
    means = first.mean(2, keepdim=True)
    torch.testing.assert_close(means.sum(-1), torch.ones(3, 2, 1), rtol=1e-6, atol=1e-6)
    a = first - attention.strength() * second + attention.strength() * means
    torch.testing.assert_close(a.sum(-1), torch.ones(3, 2, N), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(attention(x, LAYOUT, Context()), explicit(attention, x, a), rtol=1e-5, atol=1e-5)
    assert attention.scale == 1


def silent(attention: Any) -> Any:
    """lambda = 0: both exponentials cancel lambda_0."""
    for p in (attention.lambda_q2, attention.lambda_k2, attention.lambda_q1, attention.lambda_k1):
        p.zero_()
    attention.initial = 0.0
    return attention


@torch.no_grad()
@pytest.mark.parametrize("kind", ["diff", "dint"])
def test_without_lambda_it_is_the_first_map(kind: str) -> None:
    attention, x = silent(made(kind)), tokens()
    torch.testing.assert_close(
        attention(x, LAYOUT, Context()), explicit(attention, x, maps(attention, x)[0]), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_two_equal_maps_mix_attention_and_its_mean() -> None:
    attention, x = made("dint"), tokens()
    weight = attention.qkv.weight.view(3, HEADS // 2, 2, SIZE, WIDTH)
    weight[:2, :, 1] = weight[:2, :, 0]
    bias = attention.qkv.bias.view(3, HEADS // 2, 2, SIZE)
    bias[:2, :, 1] = bias[:2, :, 0]
    first, second = maps(attention, x)
    assert torch.equal(first, second)
    mix = (1 - attention.strength()) * first + attention.strength() * first.mean(2, keepdim=True)
    torch.testing.assert_close(attention(x, LAYOUT, Context()), explicit(attention, x, mix), rtol=1e-5, atol=1e-5)


def test_lambda_grows_with_the_layer_and_starts_near_its_constant() -> None:
    starts = [DiffAttention(WIDTH, HEADS, layer=layer).initial for layer in (0, 1, 27)]
    assert starts == pytest.approx([0.2, 0.8 - 0.6 * math.exp(-0.3), 0.8 - 0.6 * math.exp(-8.1)])
    torch.manual_seed(0)
    attention = DintAttention(WIDTH, HEADS, layer=3).bfloat16()
    assert attention.strength().dtype is torch.float32
    assert float(attention.strength().detach()) == pytest.approx(attention.initial, abs=0.2)


def test_as_many_weights_as_softmax_attention_and_four_vectors_and_a_norm() -> None:
    count = lambda kind: sum(p.numel() for p in self_attention(kind, WIDTH, HEADS, 0).parameters())  # noqa: E731
    assert count("diff") == count("dint") == count("softmax") + 4 * SIZE + 2 * SIZE
    assert isinstance(self_attention("softmax", WIDTH, HEADS, 5), SelfAttention)


@torch.no_grad()
def test_padding_is_no_key_and_in_no_mean() -> None:
    layout = Layout((Span("text", 3), Span("image", 4)), (2, 2))
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    context = with_padding(Context(), layout, mask)
    for kind in ("diff", "dint"):
        attention, x = made(kind), tokens()
        out = attention(x, layout, context)
        other = x.clone()
        other[:, :3][~mask] = 9.0
        changed = attention(other, layout, context)
        torch.testing.assert_close(changed[:, 3:], out[:, 3:], rtol=1e-5, atol=1e-5)
        short = torch.cat([x[1:2, :1], x[1:2, 3:]], dim=1)
        alone = attention(short, Layout((Span("text", 1), Span("image", 4)), (2, 2)), Context())
        torch.testing.assert_close(alone[:, 1:], out[1:2, 3:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_other_rules_hold_for_diff_and_are_refused_by_dint() -> None:
    layout = Layout((Span("image", 4), Span("reference", 3)), (2, 2))
    settled, gates = settle(rule(Isolate(("image",))), layout, {})
    context = Context(rule=settled, gates=dict(gates))
    attention, x = made("diff"), tokens()
    out = attention(x, layout, context)
    alone = attention(x[:, :4], Layout((Span("image", 4),), (2, 2)), Context())
    torch.testing.assert_close(out[:, :4], alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="take the kind 'diff'"):
        made("dint")(x, layout, context)


FAMILIES: dict[str, Any] = {
    "dit": DiTConfig(**LATENT, classes=10),
    "lightning-dit": LightningDiTConfig(**ODD_HEAD, classes=10, qk_norm=True),
    "skip-dit": SkipDiTConfig(**{**LATENT, "depth": 4}, classes=10),
    "u-vit": UViTConfig(**{**LATENT, "depth": 2}, **TEXT),
}


@pytest.mark.parametrize("kind", ["diff", "dint"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_setting_chooses_the_kind_in_any_family(name: str, kind: str) -> None:
    torch.manual_seed(0)
    backbone = replace(FAMILIES[name], attention=kind).build().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(0.08 * torch.randn(p.shape, generator=generator))
    args = inputs(backbone)
    assert all(type(block.attn) is KINDS[kind] for block in backbone.blocks)
    assert [round(b.attn.initial, 4) for b in backbone.blocks][:2] == [0.2, 0.3555]
    backbone(*args).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in backbone.parameters())
    assert "logits" not in backbone.blocks[0].stages
    assert "logits" in FAMILIES[name].build().blocks[0].stages
    streams, context = embedded(backbone, *args)
    heads = backbone.blocks[0](streams, context, BlockPlan(keep=("attn_heads",)))[1]["attn_heads"]
    assert heads.shape == streams["image"].shape


def test_bad_settings_are_one_clear_sentence(tmp_path: Any) -> None:
    with pytest.raises(UnknownName, match="did you mean 'dint'"):
        replace(FAMILIES["dit"], attention="dinn").build()
    with pytest.raises(UserError, match="must be even, got 3"):
        DiTConfig(depth=1, width=96, heads=3, attention="diff").build()
    backbone = replace(FAMILIES["dit"], attention="dint").build()
    with pytest.raises(UserError, match="attention"):
        save_foreign(backbone, "facebook-dit", tmp_path / "model.pt")


@torch.no_grad()
def test_a_segment_with_a_time_of_its_own_is_heard() -> None:
    backbone = replace(FAMILIES["dit"], attention="dint").build().eval()
    for p in backbone.parameters():
        p.add_(0.08 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    x, t, condition = inputs(backbone)
    memory, native = backbone.prepare(condition), backbone.preset.time.native(t)
    outs = []
    for modulation in ("t", "zero"):
        streams, context = backbone.embed(x, native, memory, [Segment("more", x.flip(0), modulation=modulation)])
        outs.append(backbone.head(backbone.run(streams, context), context))
    assert not torch.allclose(outs[0], outs[1], atol=1e-4)
    assert not torch.allclose(outs[0], backbone(x, t, condition), atol=1e-4)
