"""Linear layers cut down to some of their rows and columns, and what is composed of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditloom.parts.attention import SelfAttention
from ditloom.parts.feed_forward import MLP


def sliced(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    """A frozen linear layer of some outputs (with their biases) and some inputs (the bias stays whole)."""
    weight: Tensor = linear.weight.detach()
    bias: Tensor | None = linear.bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    with torch.device("meta"):
        cut = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    cut.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        cut.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return cut


def sliced_attention(attention: SelfAttention, heads: Tensor) -> SelfAttention:
    """Self-attention of some heads: rows of q, k, v and columns of the projection. heads: a mask [H]."""
    features = heads.repeat_interleave(attention.qkv.out_features // 3 // attention.heads)
    with torch.device("meta"):
        cut = SelfAttention(attention.qkv.in_features, attention.heads)
    cut.heads = int(heads.sum())
    cut.qkv = sliced(attention.qkv, rows=features.repeat(3).nonzero()[:, 0])
    cut.proj = sliced(attention.proj, columns=features.nonzero()[:, 0])
    cut.q_norm, cut.k_norm = attention.q_norm, attention.k_norm
    return cut


def sliced_mlp(mlp: MLP, groups: Tensor) -> MLP:
    """A feed-forward network of some groups of hidden features. groups: a mask [G]."""
    hidden = groups.repeat_interleave(mlp.fc1.out_features // len(groups)).nonzero()[:, 0]
    with torch.device("meta"):
        cut = MLP(mlp.fc1.in_features, len(hidden), exact=mlp.approximate == "none")
    cut.fc1, cut.fc2 = sliced(mlp.fc1, rows=hidden), sliced(mlp.fc2, columns=hidden)
    return cut
