"""The embedding cache gives back what the encoder said, encodes nothing twice and survives damage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditloom.conditions.borrowed import Borrowed
from ditloom.conditions.cache import EmbeddingCache, write_tensors
from ditloom.conditions.text import TextConditioner, Tokens, masked_mean
from ditloom.contracts.errors import UserError


class Letters(TextConditioner):
    """A token a letter; counts the prompts it has been asked to encode."""

    width = 3

    def __init__(self, seed: int = 0, max_tokens: int = 100):
        super().__init__()
        self.max_tokens, self.seen = max_tokens, []
        self.encoder = Borrowed(lambda: self._network(seed))

    @staticmethod
    def _network(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return torch.nn.Embedding(200, 3)

    def config(self):
        return {}

    def tokenize(self, prompts):
        self.seen += prompts
        rows = [[1, *(2 + ord(letter) % 190 for letter in prompt)] for prompt in prompts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return Tokens(ids, ids > 0, (0,) * len(rows))

    def states(self, tokens):
        states = self.encoder.network(tokens.ids)
        return states, masked_mean(states, tokens.mask)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text("abc ", max_size=6), min_size=1, max_size=8))
def test_read_back_equals_encoded(tmp_path_factory, prompts):
    direct, cache = Letters(), EmbeddingCache(Letters(), tmp_path_factory.mktemp("cache"))
    expected, got = direct.encode(prompts), cache.encode(prompts)
    assert torch.equal(got.text_mask, expected.text_mask)
    assert torch.equal(got.text, expected.text)
    torch.testing.assert_close(got.pooled, expected.pooled, atol=1e-6, rtol=0)


def test_nothing_is_encoded_twice_not_even_by_the_next_process(tmp_path):
    first = Letters()
    cache = EmbeddingCache(first, tmp_path)
    assert cache.fill(["cat", "dog", "cat", None, ""], batch=2) == 3
    assert cache.fill(["dog", "  dog "]) == 0 and sorted(first.seen) == ["", "cat", "dog"]
    second = Letters()
    again = EmbeddingCache(second, tmp_path)
    assert len(again) == 3 and "dog" in again and "fox" not in again
    assert torch.equal(again.encode(["dog", None]).text, first.encode(["dog", None]).text)
    assert second.seen == []


def test_another_encoder_or_setting_has_its_own_entries(tmp_path):
    EmbeddingCache(Letters(), tmp_path).fill(["cat"])
    for other in (Letters(seed=1), Letters(max_tokens=5)):
        assert "cat" not in EmbeddingCache(other, tmp_path)
    assert "cat" not in EmbeddingCache(Letters(), tmp_path, dtype=torch.float16)


def test_a_kill_while_writing_leaves_the_old_entries(tmp_path, monkeypatch):
    cache = EmbeddingCache(Letters(), tmp_path)
    cache.fill(["cat"])
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cache.fill(["dog"])
    monkeypatch.undo()
    again = EmbeddingCache(Letters(), tmp_path)
    assert "cat" in again and "dog" not in again and again.fill(["dog"]) == 1


def test_damaged_file_is_named(tmp_path):
    cache = EmbeddingCache(Letters(), tmp_path)
    cache.fill(["cat"])
    path = next(cache.folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"{path.name} is damaged"):
        EmbeddingCache(Letters(), tmp_path)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_tensors(tmp_path / "file" / "a.safetensors", {"a": torch.zeros(1)}, {})
