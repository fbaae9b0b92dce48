"""The tokenizer of a model folder: what transformers makes of the same files, and clear refusals."""

from __future__ import annotations

import json

import pytest

from data.tokenizer import Tokenizer
from runtime.errors import ModelError
from tests.data.making import CORPUS, tokenizer_for, write_tokenizer

TEXTS = [*CORPUS[:4], "", " ", "\n\n x", "</s><s> a<|im_end|>b", "<think>x</think>", "😀" * 3, "a\x00b"]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"bos": True},
        {"add_bos_token": True},
        {"add_bos_token": False, "bos": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"pad_token": None},
        {"unk_token": "[NEW]", "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}},
    ],
    ids=str,
)
def test_same_as_transformers(tmp_path, kind, how):
    from transformers import AutoTokenizer

    ours, theirs = tokenizer_for(tmp_path, kind=kind, **how), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        bare = ours.encode(text)
        assert bare == theirs(text, add_special_tokens=False)["input_ids"]
        if text:
            assert [*ours.prefix_ids, *bare, *ours.suffix_ids] == theirs(text)["input_ids"]
        assert ours.decode(bare) == theirs.decode(bare, clean_up_tokenization_spaces=False)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) and ours.eos_id is not None
    assert ours.pad_id == (ours.eos_id if theirs.pad_token_id is None else theirs.pad_token_id)
    assert ours.vocab_size == len(theirs) > 300


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    folder = write_tokenizer(tmp_path)
    from tokenizers import Tokenizer as Pipeline

    pipeline = Pipeline.from_file(str(folder / "tokenizer.json"))
    pipeline.enable_truncation(3)
    pipeline.enable_padding(length=64)
    pipeline.save(str(folder / "tokenizer.json"))
    text = CORPUS[0]
    assert len(Tokenizer.load(folder).encode(text)) > 10 and Tokenizer.load(folder).decode(Tokenizer.load(folder).encode(text)) == text


def test_added_tokens_of_the_config(tmp_path):
    entry = {"content": "<|new|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    size = tokenizer_for(tmp_path / "a").vocab_size
    tokenizer = tokenizer_for(tmp_path / "b", added_tokens_decoder={str(size): entry})
    assert tokenizer.encode("a<|new|>b")[1] == size and tokenizer.special_texts["<|new|>"] == size
    with pytest.raises(ModelError, match=rf"tokenizer_config.json: gives token '<\|new\|>' the id 7, but tokenizer.json makes it {size}"):
        tokenizer_for(tmp_path / "c", added_tokens_decoder={"7": entry})
    with pytest.raises(ModelError, match="added_tokens_decoder must map ids to tokens with a content"):
        tokenizer_for(tmp_path / "d", added_tokens_decoder={"7": {}})


def test_eos_ids(tmp_path):
    tokenizer = tokenizer_for(tmp_path, stop=("<|im_end|>", "<|eot_id|>"))
    assert tokenizer.eos_ids == tuple(tokenizer.special_texts[text] for text in ("</s>", "<|im_end|>", "<|eot_id|>"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert Tokenizer.load(tmp_path).eos_ids == (tokenizer.eos_id, 5)


def test_templates(tmp_path):
    assert tokenizer_for(tmp_path / "a").templates == {}
    assert tokenizer_for(tmp_path / "b", "text").templates == {"default": "text"}
    named = [{"name": "default", "template": "x"}, {"name": "rag", "template": "y"}]
    assert tokenizer_for(tmp_path / "c", chat_template=named).templates == {"default": "x", "rag": "y"}
    folder = write_tokenizer(tmp_path / "d", "old")
    (folder / "chat_template.jinja").write_text("new é", encoding="utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("tools", encoding="utf-8")
    assert Tokenizer.load(folder).templates == {"default": "new é", "tool_use": "tools"}


def test_fingerprint_is_of_contents(tmp_path):
    prints = {
        tokenizer_for(tmp_path / "a").fingerprint,
        tokenizer_for(tmp_path / "b", kind="pieces").fingerprint,
        tokenizer_for(tmp_path / "c", "x").fingerprint,
        tokenizer_for(tmp_path / "d", eos="<|im_end|>").fingerprint,
        tokenizer_for(tmp_path / "e", bos=True).fingerprint,
        tokenizer_for(tmp_path / "f", stop=("<|im_end|>",)).fingerprint,
    }
    assert len(prints) == 6
    assert tokenizer_for(tmp_path / "g").fingerprint in prints


def test_vocabulary_must_fit_the_model(tmp_path):
    tokenizer = tokenizer_for(tmp_path)
    own = tokenizer.vocab_size - 4  # <think> and the like are added tokens: documents that use them are looked at
    tokenizer.check_vocabulary(tokenizer.vocab_size)
    with pytest.raises(ModelError, match=r"the tokenizer has \d+ tokens, but the model's embeddings have 300 rows"):
        tokenizer.check_vocabulary(300)
    with pytest.raises(ModelError, match=rf"the tokenizer's bos_token has id \d+, but the model's embeddings have {own - 21} rows"):
        tokenizer.check_vocabulary(own - 21)


def test_no_tokenizer(tmp_path):
    with pytest.raises(ModelError, match=r"the model folder has no tokenizer.json$"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_text("x")
    with pytest.raises(ModelError, match=r"no tokenizer.json; it has tokenizer.model: convert it once, python -c "):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer.json: is not a tokenizer: ") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config.json: is not valid JSON: "):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"tokenizer_config.json: must hold an object, not list"):
        Tokenizer.load(tmp_path)
