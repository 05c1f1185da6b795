"""Text encoders of transformers through tiny random configurations, against the library's own forward."""

from __future__ import annotations

import json

import pytest
import torch

from ditloom.conditions.hub_text import HubText
from ditloom.contracts.errors import UserError
from ditloom.contracts.registries import CONDITIONERS

transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "apple", "sad", "cat", "##s"]
PROMPTS = ["a red apple", "", "sad cats a cat"]


def _tokenizer(folder):
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)


def _t5():
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=16, **shape))


def _clip():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=16, **shape, **special))


def _bert():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertModel(transformers.BertConfig(vocab_size=16, **shape))


@pytest.fixture(scope="module", params=[_t5, _clip, _bert], ids=["t5", "clip", "bert"])
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    model = request.param().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("encoder")
    model.save_pretrained(folder)
    _tokenizer(folder)
    return model, folder


def _reference(model, folder, **settings):
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(PROMPTS, return_tensors="pt", **settings)
    return tokens["input_ids"], tokens["attention_mask"].bool()


@torch.no_grad()
def test_states_and_pooled_equal_the_library(saved):
    model, folder = saved
    ids, mask = _reference(model, folder, padding=True)
    theirs = model(input_ids=ids, attention_mask=mask.long())
    ours = HubText(str(folder)).encode(PROMPTS)
    assert torch.equal(ours.text_mask, mask)
    torch.testing.assert_close(ours.text[mask], theirs.last_hidden_state[mask], atol=1e-6, rtol=0)
    own = getattr(theirs, "pooler_output", None)
    means = torch.stack([row[keep].mean(0) for row, keep in zip(theirs.last_hidden_state, mask, strict=True)])
    torch.testing.assert_close(ours.pooled, means if own is None else own, atol=1e-5, rtol=0)


@torch.no_grad()
def test_inner_layer_and_padding_to_the_maximum(saved):
    model, folder = saved
    ids, _ = _reference(model, folder, padding="max_length", max_length=12)
    theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    ours = HubText(str(folder), max_tokens=12, pad_to_max=True, layer=-2).encode(PROMPTS)
    assert ours.text.shape == (3, 12, 32) and ours.text_mask.all()
    torch.testing.assert_close(ours.text, theirs.hidden_states[-2], atol=1e-6, rtol=0)


def test_config_rebuilds_it_and_long_prompts_are_cut(saved):
    _, folder = saved
    ours = HubText(str(folder), max_tokens=4)
    again = CONDITIONERS.get("hub-text")(**json.loads(json.dumps(ours.config())))
    assert again.width == 32 and again.fingerprint() == ours.fingerprint()
    with pytest.warns(UserWarning, match="first 4 tokens were kept and up to 2 dropped"):
        assert again.encode(["a red red apple"]).text.shape == (1, 4, 32)
    assert torch.equal(again.null(1).text, again.encode([""]).text)


def test_a_folder_without_an_encoder_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot load the text encoder"):
        HubText(str(tmp_path)).encode(["a"])
