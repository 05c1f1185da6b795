"""Patches, norms, feed-forward, modulation, segments: small closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Segment
from ditloom.parts import cost
from ditloom.parts.embedders import LabelEmbedding
from ditloom.parts.feed_forward import MLP, SwiGLU
from ditloom.parts.modulation import AdaLN
from ditloom.parts.norms import LayerNorm, RMSNorm, modulate, norm
from ditloom.parts.patches import PatchEmbed, patchify, unpatchify
from ditloom.parts.positions import sincos_at
from ditloom.parts.segments import check_streams, join, modulation


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_unpatchify_undoes_patchify(rows: int, columns: int, channels: int, patch: int) -> None:
    x = seeded(2, channels, rows * patch, columns * patch)
    tokens = patchify(x, patch).unflatten(-1, (channels, patch, patch)).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(unpatchify(tokens, patch, (rows, columns)), x)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patch_embedding_is_its_convolution(patch: int) -> None:
    embedder = PatchEmbed(patch, 3, 16)
    x = seeded(2, 3, 8, 12)
    expected = embedder.proj(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedder(x), expected, rtol=1e-5, atol=1e-6)
    assert embedder.macs(10) == 10 * 3 * patch**2 * 16


def test_norms() -> None:
    x = 3 * seeded(2, 5, 16) + 1
    rms = RMSNorm(16)
    torch.testing.assert_close(rms(x), F.rms_norm(x, (16,), eps=1e-6))
    assert rms(x.bfloat16()).dtype is torch.bfloat16
    torch.testing.assert_close(LayerNorm(16)(x), F.layer_norm(x, (16,), eps=1e-6))
    assert not list(LayerNorm(16).parameters())
    assert norm("layer-affine", 16).eps == 1e-5
    assert isinstance(norm("rms", 16), RMSNorm)


def test_modulation_is_scale_then_shift() -> None:
    x, shift, scale = seeded(2, 5, 8), seeded(2, 1, 8), seeded(1, 1, 8)
    torch.testing.assert_close(modulate(x, shift, scale), x * (1 + scale) + shift)
    ada = AdaLN(8, 6)
    chunks = ada(seeded(2, 3, 8))
    assert len(chunks) == 6
    torch.testing.assert_close(torch.cat(chunks, -1), ada.linear(F.silu(seeded(2, 3, 8))))
    assert ada.macs(2) == 2 * 8 * 48


def test_feed_forward() -> None:
    x = seeded(2, 5, 8)
    mlp, exact, swiglu = MLP(8, 32), MLP(8, 32, exact=True), SwiGLU(8, 20)
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh")))
    torch.testing.assert_close(exact(x), exact.fc2(F.gelu(exact.fc1(x))))
    a, b = swiglu.w12(x).chunk(2, -1)
    torch.testing.assert_close(swiglu(x), swiglu.w3(F.silu(a) * b))
    assert mlp.macs(7) == 7 * 2 * 8 * 32
    assert swiglu.macs(7) == 7 * 3 * 8 * 20


def test_cost_asks_a_layer_that_knows_its_own() -> None:
    layer = torch.nn.Linear(4, 6)
    assert cost.linear(layer, 5) == 120
    layer.macs_per_token = 7  # type: ignore[assignment]
    assert cost.linear(layer, 5) == 35
    assert cost.attention(3, 5, 8) == 2 * 3 * 5 * 8
    assert cost.convolution(torch.nn.Conv2d(4, 6, 3, groups=2), 10) == 2 * 6 * 9 * 10


def test_no_class_is_a_row_of_its_own() -> None:
    table = LabelEmbedding(10, 8)
    assert table.embedding_table.num_embeddings == 11
    assert LabelEmbedding(10, 8, null=False).embedding_table.num_embeddings == 10
    assert torch.equal(table.check(torch.tensor([0, 10])), torch.tensor([0, 10]))
    with pytest.raises(UserError, match="0..10"):
        table.check(torch.tensor([11]))


def test_segments_join_their_stream() -> None:
    embedder, x = PatchEmbed(2, 3, 8), seeded(2, 3, 4, 6)
    places = torch.tensor([[0.0, 7.0], [1.0, 7.0]])
    picture = Segment("reference", seeded(2, 3, 4, 2), positions=places, modulation="zero")
    tokens = Segment("extra", seeded(2, 5, 8))
    other = Segment("words", seeded(2, 4, 8), weights="text")
    joined = join(x, embedder, [picture, tokens, other])
    assert [(s.name, s.length) for s in joined.layout.spans] == [("image", 6), ("reference", 2), ("extra", 5)]
    expected = embedder(picture.tokens) + sincos_at(places, 8).float()
    torch.testing.assert_close(joined.tokens[:, joined.layout.slice("reference")], expected)
    torch.testing.assert_close(joined.tokens[:, joined.layout.slice("extra")], tokens.tokens)
    bare = join(x, embedder, absolute=False)
    torch.testing.assert_close(bare.tokens, embedder(x))
    own = join(x, embedder, absolute=lambda tokens, grid, positions: tokens + grid[0])
    torch.testing.assert_close(own.tokens, embedder(x) + 2)
    with pytest.raises(UserError, match="weights of 'text'; DiT has 'image'"):
        check_streams([other], ("image",), "DiT")


def test_modulation_has_a_row_for_every_group() -> None:
    emb, vector = seeded(2, 8), seeded(2, 8) * 2
    level = lambda t: t.float()[:, None].expand(-1, 8)  # noqa: E731
    segments = [
        Segment("a", seeded(2, 3, 8)),
        Segment("b", seeded(2, 3, 8), modulation="zero"),
        Segment("c", seeded(2, 3, 8), modulation="own", time=torch.tensor([0.3, 0.7])),
    ]
    c = modulation(emb, vector, segments, level)
    assert c.shape == (2, 3, 8)
    torch.testing.assert_close(c[:, 0], emb + vector)
    torch.testing.assert_close(c[:, 1], vector)
    torch.testing.assert_close(c[1, 2], vector[1] + 0.7)
