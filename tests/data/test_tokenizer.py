"""The tokenizer of a model folder: what transformers makes of the same files, and clear refusals."""

from __future__ import annotations

import json
import os

import pytest

from data.tokenizer import Tokenizer, read_template
from runtime.errors import DataError, ModelError
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
    with pytest.raises(ModelError, match=r"added_tokens_decoder.7={} must be an object with a text as its content"):
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
    with pytest.raises(ModelError, match=r"tokenizer_config.json: not readable as JSON: "):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"tokenizer_config.json: must hold a JSON object"):
        Tokenizer.load(tmp_path)


def listed(file: str, key: str, values: list, message: str = "") -> list[tuple[str, dict, str]]:
    """Cases: of a file, a key with each of the values, which is refused by name."""
    return [(file, {key: value}, f"{key}={message}") for value in values]


CONFIG, ADDED, X = "tokenizer_config.json", "added_tokens_decoder", {"content": "<x>"}
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
WRONG = [
    *listed(CONFIG, "chat_template", [3, True, [{"x": 1}], ["a"], ["a", 1], {"default": 3}, "\ud800", [{"name": "default"}]]),
    *listed(CONFIG, "chat_template", [[{"name": 1, "template": "x"}], [{"name": "x", "template": 4}]]),
    *listed(CONFIG, "eos_token", [["a"], 3, {"a": 1}, {"content": 5}, "\ud800", False], ".* must be text"),
    *listed("special_tokens_map.json", "pad_token", [1, [], {}], ".* must be text"),
    *listed(CONFIG, ADDED, [[1], 3, "x"], ".* must map ids to tokens"),
    *[(CONFIG, {ADDED: {i: X}}, "is not the id of a token") for i in ("-1", "x", "9" * 5000, "1_0", " 7", "٣")],
    (CONFIG, {ADDED: {"470": X, "0470": X}}, "is not the id of a token, or names one twice"),
    *[(CONFIG, {ADDED: {"470": entry}}, rf"{ADDED}\.470=") for entry in ({"content": 5}, 3, [], {}, {"content": "\udc00"})],
    *[(CONFIG, {ADDED: {"470": X | {flag: "yes"}}}, rf"{ADDED}\.470\.{flag}=.yes. must be true") for flag in FLAGS],
    *listed("generation_config.json", "eos_token_id", ["x", {"a": 1}, -5, 1.5, [[2]], [1, "x"], [None], True, 2**31, 10**20, [1, -1]]),
]


def test_values_have_a_type(tmp_path):
    for i, (file, values, message) in enumerate(WRONG):
        path = write_tokenizer(tmp_path / str(i)) / file
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
        with pytest.raises(ModelError, match=f"{file}: .*{message}") as caught:
            Tokenizer.load(path.parent)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_values_that_may_be_absent(tmp_path):
    size = tokenizer_for(tmp_path / "a").vocab_size
    for i, value in enumerate((None, [], {}, "")):
        folder = write_tokenizer(tmp_path / str(i), chat_template=value, added_tokens_decoder=None, add_bos_token=True, bos_token=None)
        (folder / "generation_config.json").write_text('{"eos_token_id": null}')
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.templates == {} and tokenizer.vocab_size == size and tokenizer.bos_id is None


FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", [*FILES, "additional_chat_templates/x.jinja"])
def test_no_file_is_read_that_the_folder_does_not_hold(tmp_path, name):
    path = write_tokenizer(tmp_path / "model", "text") / name
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "secret").write_text("{}")
    for make in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "secret"), lambda path: path.symlink_to("/proc/self/environ")):
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(ModelError, match=f"{name}: is (no regular file|a link to .*, outside its folder)"):
            Tokenizer.load(tmp_path / "model")


def test_a_template_that_the_user_names(tmp_path, monkeypatch):
    (tmp_path / "real").write_bytes(b"a\r\nb")
    (tmp_path / "t.jinja").symlink_to("real")
    assert read_template(tmp_path / "t.jinja") == "a\nb"
    os.mkfifo(tmp_path / "fifo")
    for path, message in (
        (tmp_path / "fifo", "cannot be read: it is no regular file"),
        (tmp_path, "cannot be read: it is no regular file"),
        (tmp_path / ("x" * 5000), "cannot be read: File name too long"),
        (tmp_path / "absent", "cannot be read: No such file"),
    ):
        with pytest.raises(DataError, match=message):
            read_template(path)
    monkeypatch.setattr("data.tokenizer.MAX_TEMPLATE", 3)
    with pytest.raises(DataError, match="the chat template is larger than"):
        read_template(tmp_path / "t.jinja")


def test_what_the_library_cannot_do_is_one_line(tmp_path):
    """A tokenizer.json that parses and cannot tokenize: the library raises, or panics."""
    word = {"type": "WordLevel", "vocab": {}, "unk_token": "x"}
    pieces = {"type": "Unigram", "vocab": [], "unk_id": None}
    missing = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "Q", "type_id": 0}}], "pair": [], "special_tokens": {}}
    cases = [
        ({"model": word}, "cannot tokenize: WordLevel error"),
        ({"model": pieces}, "cannot tokenize: Encountered an unknown token"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "is not a tokenizer: Precompiled"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "cannot tokenize: chunk size must be non-zero"),
        ({"post_processor": missing}, "cannot tokenize: no entry found for key"),
    ]
    for i, (change, message) in enumerate(cases):
        path = write_tokenizer(tmp_path / str(i)) / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ModelError, match=f"tokenizer.json: {message}") as caught:
            Tokenizer.load(path.parent)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pieces", [[], ["A", "A"], ["B"], ["<s>"], ["A", "<s>", "A"]], ids=str)
def test_a_post_processor_may_only_put_tokens_around_a_text(tmp_path, pieces):
    path = write_tokenizer(tmp_path, bos=True) / "tokenizer.json"
    whole = json.loads(path.read_text())
    sequence = lambda name: {"Sequence": {"id": name, "type_id": 0}}  # noqa: E731
    token = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    whole["post_processor"]["single"] = [token if name == "<s>" else sequence(name) for name in pieces]
    path.write_text(json.dumps(whole))
    with pytest.raises(ModelError, match=r"post-processor changes the text's own tokens|cannot tokenize"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_that_fails_at_some_texts_only(tmp_path):
    path = write_tokenizer(tmp_path) / "tokenizer.json"
    whole = json.loads(path.read_text())
    word = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "x"}
    path.write_text(json.dumps(whole | {"model": word, "pre_tokenizer": None, "post_processor": None, "added_tokens": []}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("a") == [0]
    for attempt in (lambda: tokenizer.encode("b"), lambda: tokenizer.encode_batch(["a", "b"])):
        with pytest.raises(ModelError, match="the tokenizer fails: WordLevel error"):
            attempt()
