"""From files to documents: exactly the right tokens and targets for every format, errors by file and line, the cache."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from data import documents
from data import prepare as module
from data.chat import Chat
from data.config import DataConfig, SourceConfig
from data.documents import Documents
from data.formats.instruct import ALPACA, ALPACA_INPUT
from data.prepare import prepare, token_ranges, token_ranges_ref
from data.sample import IGNORE
from data.tokenizer import Tokenizer
from runtime.errors import DataError, ModelError
from tests.data.making import CORPUS, TEMPLATES, bracketed, tokenizer_for, turns, write_jsonl


def make(tmp_path: Path, tokenizer: Tokenizer, *sources: SourceConfig, seed: int = 0, **keys) -> Documents:
    cfg = DataConfig(sources=sources, **{"tokens": 512, **keys})
    return prepare(cfg, cfg.sources, tokenizer, tmp_path / "cache", seed, progress=False)


def source(path: Path, format: str, **keys) -> SourceConfig:
    return SourceConfig(str(path), format, **keys)


def ids_and_targets(docs: Documents, i: int) -> tuple[list[int], list[int]]:
    """Token ids, and those of them that are targets, by their own place."""
    ids, labels, _ = docs.read(i)
    assert len(ids) == len(labels) == docs.lengths[i]
    trained = [int(label) for label in labels if label != IGNORE]
    assert all(label in (IGNORE, token) for label, token in zip(labels[:-1], ids[1:]))
    return ids.tolist(), trained


# ---------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("bos", [False, True])
def test_completion(tmp_path, kind, bos):
    tokenizer = tokenizer_for(tmp_path, kind=kind, bos=bos)
    docs = make(tmp_path, tokenizer, source(write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in CORPUS[:4]]), "completion"))
    assert len(docs) == 4
    for i, text in enumerate(CORPUS[:4]):
        ids = [*([tokenizer.bos_id] if bos else []), *tokenizer.encode(text), tokenizer.eos_id]
        assert ids_and_targets(docs, i) == (ids, ids[1:])


@pytest.mark.parametrize("bos", [False, True])
def test_instruct(tmp_path, bos):
    tokenizer = tokenizer_for(tmp_path, bos=bos)
    rows = [{"instruction": "Say {x} hello", "output": " Hello"}, {"instruction": "Sum", "input": "1 {2}", "output": "3\n"}]
    docs = make(tmp_path, tokenizer, source(write_jsonl(tmp_path / "a.jsonl", rows), "instruct"))
    prompts = [ALPACA.format(instruction="Say {x} hello"), ALPACA_INPUT.format(instruction="Sum", input="1 {2}")]
    for i, (row, prompt) in enumerate(zip(rows, prompts)):
        head = [*([tokenizer.bos_id] if bos else []), *tokenizer.encode(prompt)]
        whole = [*([tokenizer.bos_id] if bos else []), *tokenizer.encode(prompt + row["output"]), tokenizer.eos_id]
        ids, targets = ids_and_targets(docs, i)
        assert ids == whole and targets == whole[len(whole) - len(targets) :]
        assert tokenizer.decode(targets) == row["output"] + "</s>" and len(head) + len(targets) == len(whole)
    every = make(tmp_path, tokenizer, source(tmp_path / "a.jsonl", "instruct", train_on="all"))
    ids, targets = ids_and_targets(every, 0)
    assert targets == ids[1:]


def test_instruct_as_chat_and_own_fields(tmp_path):
    tokenizer = tokenizer_for(tmp_path, "chatml")
    rows = [{"q": "Sum", "context": "1 2", "a": "3", "input": 5}]
    fields = {"instruction": "q", "input": "context", "output": "a"}
    docs = make(tmp_path, tokenizer, source(write_jsonl(tmp_path / "a.jsonl", rows), "instruct", prompt="chat", fields=fields))
    ids, targets = ids_and_targets(docs, 0)
    assert tokenizer.decode(ids) == "<|im_start|>user\nSum\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    assert tokenizer.decode(targets) == "3<|im_end|>"


def decoded(tokenizer: Tokenizer, docs: Documents, i: int) -> str:
    """The document's text with targets in ⟦ ⟧, which a split document's runs show whole."""
    ids, labels, _ = docs.read(i)
    trained = [False, *(labels[:-1] != IGNORE)]
    text = ""
    for n, (token, learned) in enumerate(zip(ids.tolist(), trained)):
        text += "⟦" if learned and not trained[n - 1] else "⟧" if n and trained[n - 1] and not learned else ""
        text += tokenizer.decode([token])
    return text + ("⟧" if trained[-1] else "")


def test_chat_and_what_decides_its_masks(tmp_path):
    tokenizer = tokenizer_for(tmp_path, "chatml")
    talk = turns("Hi", "One", "b", "Two")
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": talk, "id": 7}])
    head, tail = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    every = f"{head}⟦One<|im_end|>⟧\n{tail}⟦Two<|im_end|>⟧\n"

    def of(rows=None, **keys):
        where = path if rows is None else write_jsonl(tmp_path / "b.jsonl", rows)
        return decoded(tokenizer, make(tmp_path, tokenizer, source(where, "chat", **keys)), 0)

    assert of() == every
    assert of(train_on="last") == f"{head}One<|im_end|>\n{tail}⟦Two<|im_end|>⟧\n"
    assert of(train_on="all") == "<|im_start|>⟦" + every.replace("⟦", "").replace("⟧", "").removeprefix("<|im_start|>") + "⟧"
    weights = [{**m, "weight": w} for m, w in zip(talk, (0, 0, 0, 1))]
    assert of([{"messages": weights}]) == of(train_on="last")
    assert of([{"messages": [talk[0], {**talk[1], "weight": False}, talk[2], talk[3]]}]) == of(train_on="last")
    share = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in talk]
    fields = {"messages": "conversations", "role": "from", "content": "value"}
    assert of([{"conversations": share}], fields=fields) == every
    assert of([{"messages": [{**m, "role": m["role"][:1]} for m in talk]}], roles={"u": "user", "a": "assistant"}) == every
    assert of([{"messages": talk, "system": "S"}]) == "<|im_start|>system\nS<|im_end|>\n" + every
    assert of([{"messages": turns("Hi", "One", "b", "Two", system="S")}]) == "<|im_start|>system\nS<|im_end|>\n" + every


def test_chat_tools_and_parts(tmp_path):
    tokenizer = tokenizer_for(tmp_path, "{{ tools | tojson }}" + TEMPLATES["thinking"])
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {"messages": [turns("Hi")[0], {"role": "assistant", "content": "go", "tool_calls": [call]}], "tools": '[{"name": "f"}]'}
    docs = make(tmp_path, tokenizer, source(write_jsonl(tmp_path / "a.jsonl", [row]), "chat"))
    assert decoded(tokenizer, docs, 0) == (
        '[{"name": "f"}]<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\ngo\n<tool_call>\n'
        '{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>⟧\n'
    )
    parts = tokenizer_for(tmp_path / "p", TEMPLATES["chatml"].replace("m['content']", "m['content'][0]['text']"))
    row = {"messages": [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in (("user", "Hi"), ("assistant", "Yo"))]}
    docs = make(tmp_path, parts, source(write_jsonl(tmp_path / "b.jsonl", [row]), "chat"))
    assert decoded(parts, docs, 0) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yo<|im_end|>⟧\n"


def test_template_of_the_config(tmp_path):
    tokenizer = tokenizer_for(tmp_path, "chatml")
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ word ~ strftime_now('%Y') ~ m.content ~ eos_token }}{% endfor %}", encoding="utf-8")
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns("Hi", "Yo")}])
    docs = make(tmp_path, tokenizer, source(path, "chat"), template=str(own), template_args={"word": ">"}, date="1999-12-31")
    assert tokenizer.decode(docs.read(0)[0]) == ">1999Hi</s>>1999Yo</s>"


def test_tokenized(tmp_path):
    tokenizer = tokenizer_for(tmp_path, bos=True)
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 1]},
        {"input_ids": [5, 6, 7, 8], "mask": [1, 0, 0, 1]},
        {"input_ids": [5, 6, 7, 8]},
    ]
    docs = make(tmp_path, tokenizer, source(write_jsonl(tmp_path / "a.jsonl", rows), "tokenized"))
    assert [ids_and_targets(docs, i) for i in range(3)] == [([5, 6, 7, 8], t) for t in ([7, 8], [8], [6, 7, 8])]


def test_a_csv_is_as_good_as_json(tmp_path):
    tokenizer = tokenizer_for(tmp_path)
    (tmp_path / "a.csv").write_text("instruction,input,output\nSay,,Yo\n", encoding="utf-8")
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "Say", "input": "", "output": "Yo"}])
    a, b = (make(tmp_path, tokenizer, source(p, "instruct")) for p in (tmp_path / "a.csv", path))
    assert ids_and_targets(a, 0) == ids_and_targets(b, 0)


# ------------------------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_masks_of_random_conversations(tmp_path, kind):
    """Characters and tokens, followed one by one: a token is trained if and only if it overlaps what is trained."""
    from tests.data.test_chat import assistant, random_text

    tokenizer = tokenizer_for(tmp_path, "chatml", kind=kind)
    chat, rng = Chat(tokenizer), random.Random(kind)
    talks = [turns(*(random_text(rng) for _ in range(rng.randint(2, 60)))) for _ in range(120)]
    docs = make(tmp_path, tokenizer, source(write_jsonl(tmp_path / "a.jsonl", [{"messages": t} for t in talks]), "chat"), tokens=1 << 14)
    assert len(docs) == len(talks)
    fast = 0
    for i, talk in enumerate(talks):
        text, spans = chat.spans(talk, None, assistant(talk))
        encoding = tokenizer.encode_batch([text])[0]
        inside = np.zeros(len(text), bool)
        for begin, end in spans:
            inside[begin:end] = True
        trained = [bool(inside[begin:end].any()) for begin, end in encoding.offsets]
        ids, labels, _ = docs.read(i)
        assert ids.tolist() == encoding.ids
        assert (labels[:-1] != IGNORE).tolist() == trained[1:], bracketed(text, spans)
        assert token_ranges(encoding, spans, len(text)) == token_ranges_ref(encoding, spans)
        fast += len(spans) <= module._MANY_SPANS
    assert 20 < fast < len(talks) - 20  # both ways of finding tokens were used


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_tokens_of_any_span(tmp_path, kind):
    """Borders may lie anywhere, in the middle of tokens and of characters that are several tokens."""
    from tests.data.test_chat import random_text

    tokenizer, rng = tokenizer_for(tmp_path, kind=kind), random.Random(0)
    straddling = 0
    for _ in range(300):
        text = rng.choice(CORPUS) + random_text(rng) + rng.choice(CORPUS)
        borders = sorted(rng.sample(range(len(text) + 1), 2 * rng.randint(1, 20)))
        spans = list(zip(borders[::2], borders[1::2]))
        encoding = tokenizer.encode_batch([text])[0]
        expected = []
        for begin, end in spans:
            over = [i for i, (a, b) in enumerate(encoding.offsets) if a < end and b > begin]
            straddling += encoding.offsets[over[-1]][1] > end
            expected.append((over[0], over[-1] + 1))
        assert token_ranges_ref(encoding, spans) == expected
        assert token_ranges(encoding, spans[:4], len(text)) == expected[:4]
    assert straddling > 300


def test_long_conversations_take_linear_time(tmp_path):
    tokenizer = tokenizer_for(tmp_path, "chatml")
    chat = Chat(tokenizer)

    def seconds(count: int) -> float:
        talk = turns(*["some words"] * count)
        begin = time.process_time()
        text, spans = chat.spans(talk, None, [i % 2 == 1 for i in range(count)])
        token_ranges(tokenizer.encode_batch([text])[0], spans, len(text))
        return time.process_time() - begin

    seconds(100)
    assert seconds(8000) < 60 * seconds(400) + 0.2  # 20 times the turns; quadratic would be 400 times


# ------------------------------------------------------------------------------------------------------------ bad records

GOOD = {"messages": turns("Hi", "Yo")}
BAD = [
    ("chat", [1], "expected an object, got a list"),
    ("chat", {"conversations": []}, "has no field 'messages' (it has 'conversations'); names can be set with fields"),
    ("chat", {"messages": None}, "field 'messages' is null"),
    ("chat", {"messages": "x"}, "field 'messages' must be a list, got a string"),
    ("chat", {"messages": []}, "field 'messages' is empty"),
    ("chat", {"messages": ["x"]}, "message 1: expected an object, got a string"),
    ("chat", {"messages": [{"role": "user"}]}, "message 1: has no field 'content' (it has 'role'); names can be set with fields"),
    ("chat", {"messages": [{"role": "user", "content": None}]}, "message 1: field 'content' is null"),
    ("chat", {"messages": [{"content": "x"}]}, "message 1: has no field 'role' (it has 'content'); names can be set with fields"),
    ("chat", {"messages": [{"role": "user", "content": 5}]}, "message 1: field 'content' must be a string, got a number"),
    ("chat", {"messages": [{"role": 3, "content": "x"}]}, "message 1: field 'role' must be a string, got a number"),
    (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "message 1: has content of type 'image'; only text can be trained",
    ),
    ("chat", {"messages": [{"role": "user", "content": "x", "weight": 0.5}]}, "message 1: field 'weight' must be 0 or 1, got 0.5"),
    ("chat", {"messages": turns("a", "")}, "message 2 (assistant) is empty, but would be trained; give it weight 0, or remove it"),
    (
        "chat",
        {"messages": turns("a", "b", system="s"), "system": "t"},
        "has a field 'system' and a first message of role system; keep one of them",
    ),
    ("chat", {**GOOD, "tools": "x"}, "field 'tools' is a string, but not a list as JSON"),
    ("chat", {**GOOD, "tools": {}}, "field 'tools' must be a list, got an object"),
    (
        "chat",
        {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
        "message 1: has no field 'name' (it has none); names can be set with fields",
    ),
    ("chat", {"messages": [{"role": "teacher", "content": "x"}]}, "the chat template refuses it: unknown role teacher"),
    (
        "chat",
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"name": "f"}]}]},
        "message 1 (assistant): the chat template leaves",
    ),
    ("chat", {"messages": turns("\ud800", "x")}, "has \\ud800, half of a surrogate pair, which is not text"),
    ("instruct", {"instruction": "x"}, "has no field 'output' (it has 'instruction'); names can be set with fields"),
    ("instruct", {"instruction": "x", "output": None}, "field 'output' is null"),
    ("instruct", {"instruction": "x", "output": " "}, "field 'output' is empty, so there is nothing to learn"),
    ("instruct", {"instruction": "x", "input": ["y"], "output": "z"}, "field 'input' must be a string, got a list"),
    ("completion", {"text": ""}, "field 'text' is empty"),
    ("completion", {"text": True}, "field 'text' must be a string, got a boolean"),
    ("completion", {}, "has no field 'text' (it has none); names can be set with fields"),
    ("tokenized", {"input_ids": []}, "field 'input_ids' is empty"),
    ("tokenized", {"input_ids": [1, True]}, "field 'input_ids' must be a list of integers"),
    ("tokenized", {"input_ids": [1, -1]}, "field 'input_ids' has an id outside 0 to 2^31 - 1"),
    ("tokenized", {"input_ids": [1, 2**31]}, "field 'input_ids' has an id outside 0 to 2^31 - 1"),
    ("tokenized", {"input_ids": [1, 2**70]}, "field 'input_ids' has an integer beyond 64 bits"),
    ("tokenized", {"input_ids": [1, 2], "labels": [1]}, "field 'labels' has 1 entries for 2 ids"),
    ("tokenized", {"input_ids": [1, 2], "labels": [-100, 3]}, "field 'labels' has 3 at 1, where 2 or -100 is expected"),
    ("tokenized", {"input_ids": [1, 2], "mask": [2, 1]}, "field 'mask' has 2 at 0, where 0 or 1 is expected"),
    ("tokenized", {"input_ids": [1, 2], "mask": [1, 1], "labels": [1, 2]}, "has both 'labels' and 'mask'; keep one of them"),
    ("tokenized", {"input_ids": [1, 2], "attention_mask": [1, 0]}, "its attention_mask has zeros: remove the padding"),
]
FINE = {
    "chat": GOOD,
    "instruct": {"instruction": "a", "output": "b"},
    "completion": {"text": "a b c"},
    "tokenized": {"input_ids": [1, 2, 3]},
}
STRICT = TEMPLATES["chatml"].replace(
    "{{ '<|im_start|>'", "{% if m.role == 'teacher' %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}{{ '<|im_start|>'"
)


@pytest.mark.parametrize("format, record, message", BAD)
def test_bad_records_are_named_by_line(tmp_path, format, record, message):
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps(FINE[format]) + "\n") * 3 + "\n" + json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        make(tmp_path, tokenizer_for(tmp_path, STRICT), source(path, format))
    assert str(caught.value).startswith(f"{path}:5: {message}") and "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_nothing_to_read_and_nothing_to_learn(tmp_path):
    tokenizer = tokenizer_for(tmp_path, "chatml")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty.jsonl: there are no records$"):
        make(tmp_path, tokenizer, source(tmp_path / "empty.jsonl", "chat"))
    path = write_jsonl(tmp_path / "user.jsonl", [{"messages": turns("Hi")}] * 3)
    with pytest.raises(DataError, match=r"user.jsonl: nothing to train on: none of its 3 documents has a trained token"):
        make(tmp_path, tokenizer, source(path, "chat"))
    with pytest.raises(DataError, match=r"user.jsonl:1: gives no tokens$"):
        make(tmp_path, tokenizer_for(tmp_path / "silent", "{{ '' }}"), source(path, "chat"))
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": "x y z " * 50}] * 2 + [{"messages": 1, "text": "x y z " * 60}])
    with pytest.raises(
        DataError, match=r"long.jsonl: nothing to train on: of its 3 documents, 0 have no trained token and 3 have more than 16"
    ):
        make(tmp_path, tokenizer, source(long, "completion"), tokens=16, overflow="drop")
    with pytest.raises(ModelError, match="the tokenizer has no eos_token to end documents with"):
        make(tmp_path, tokenizer_for(tmp_path / "t", eos_token=None), source(long, "completion"))


def test_vocabulary_of_documents(tmp_path, monkeypatch):
    """The line is found however many parts the store is looked through in."""
    write_jsonl(tmp_path / "a" / "1.jsonl", [{"input_ids": [1, 5, 3]}] * 3)
    write_jsonl(tmp_path / "a" / "2.jsonl", [{"input_ids": [7, 4]}, {"input_ids": [1, 998, 3]}, {"input_ids": [1, 999, 3]}])
    docs = make(tmp_path, tokenizer_for(tmp_path), source(tmp_path / "a", "tokenized"))
    docs.check_vocabulary(1000)
    for part in (1, 4, 1 << 24):
        monkeypatch.setattr(documents, "_PART", part)
        with pytest.raises(DataError, match=r"2.jsonl:3: token id 999, but the model's embeddings have 999 rows: use "):
            docs.check_vocabulary(999)
        with pytest.raises(DataError, match=r"2.jsonl:2: token id 998, but"):
            docs.check_vocabulary(8)


# --------------------------------------------------------------------------------------------------------------- overflow


def sequences(*lengths: int, **fields) -> list[dict]:
    """Documents whose ids tell their document and place apart."""
    return [{"input_ids": [1000 * (d + 1) + t for t in range(n)], **fields} for d, n in enumerate(lengths)]


def test_split_loses_no_target_and_repeats_none(tmp_path):
    lengths = [3, 10, 11, 20, 21, 100, 2, 10]
    path = write_jsonl(tmp_path / "a.jsonl", sequences(*lengths))
    docs = make(tmp_path, tokenizer_for(tmp_path), source(path, "tokenized"), max_length=10, overflow="split")
    assert docs.lengths.max() == 10
    ids, targets = zip(*(ids_and_targets(docs, i) for i in range(len(docs))))
    everything = [t for row in sequences(*lengths) for t in row["input_ids"]]
    firsts = {1000 * (d + 1) for d in range(len(lengths))}
    assert [t for piece in targets for t in piece] == [t for t in everything if t not in firsts]
    # The 11th and 21st token of 11 and 21 are targets of the piece before; a piece of their own would have none
    assert [t for piece in ids for t in piece] == [t for t in everything if t not in (3010, 5020)]
    assert "4 of 8 documents have more than 10 tokens: split into pieces" in docs.report()


def test_truncate_drop_and_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", sequences(3, 11, 4, 30))
    tokenizer = tokenizer_for(tmp_path)

    def of(overflow):
        return make(tmp_path, tokenizer, source(path, "tokenized"), max_length=10, overflow=overflow)

    docs = of("truncate")
    rows = sequences(3, 10, 4, 10)
    assert [ids_and_targets(docs, i) for i in range(4)] == [(row["input_ids"], row["input_ids"][1:]) for row in rows]
    assert "2 of 4 documents have more than 10 tokens: truncated, 21 tokens cut off" in docs.report()
    docs = of("drop")
    assert docs.lengths.tolist() == [3, 4] and "2 of 4 documents have more than 10 tokens: left out, 41 tokens" in docs.report()
    with pytest.raises(DataError, match=re.escape(f"{path}:2: the document has 11 tokens, more than 10; raise data.max_length, or set")):
        of("error")
    two = (
        write_jsonl(tmp_path / "f/1.jsonl", sequences(3)),
        write_jsonl(tmp_path / "f/2.jsonl", []),
        write_jsonl(tmp_path / "f/3.jsonl", sequences(4, 12)),
    )
    with pytest.raises(DataError, match=re.escape(f"{two[2]}:2: the document has 12 tokens")):
        make(tmp_path, tokenizer, source(tmp_path / "f", "tokenized"), max_length=10, overflow="error")


def test_pieces_without_targets_are_left_out(tmp_path):
    rows = [
        {"input_ids": list(range(30)), "mask": [0] * 10 + [1] + [0] * 19},  # the one target is the first token of the second piece
        {"input_ids": list(range(30)), "mask": [0] * 25 + [1] * 5},
        {"input_ids": [1, 2, 3], "mask": [1, 0, 0]},  # nothing predicts a first token
    ]
    tokenizer, path = tokenizer_for(tmp_path), write_jsonl(tmp_path / "a.jsonl", rows)
    docs = make(tmp_path, tokenizer, source(path, "tokenized"), max_length=10, overflow="split")
    assert [ids_and_targets(docs, i) for i in range(len(docs))] == [(list(range(10)), [10]), (list(range(20, 30)), [25, 26, 27, 28, 29])]
    assert "1 of 3 documents have nothing to learn: left out" in docs.report()
    with pytest.raises(DataError, match="of its 3 documents, 3 have no trained token and 2 have more than 10 tokens"):
        make(tmp_path, tokenizer, source(path, "tokenized"), max_length=10, overflow="truncate")


# --------------------------------------------------------------------------------------------------- splits, weights, names


def mixed(tmp_path: Path, **weights: float) -> Documents:
    tokenizer = tokenizer_for(tmp_path)
    counts = {"big": 1000, "small": 20, "one": 1}
    sources = []
    for s, (name, n) in enumerate(counts.items()):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"input_ids": [s, *range(i + 10, i + 10 + 3 + i % 9)]} for i in range(n)])
        sources.append(source(tmp_path / f"{name}.jsonl", "tokenized", weight=weights.get(name, 1.0)))
    return make(tmp_path, tokenizer, *sources, max_length=8, overflow="split")


def contents(docs: Documents) -> list[tuple]:
    return [(docs.read(i)[2], *docs.read(i)[0].tolist()) for i in range(len(docs))]


def test_holding_out(tmp_path):
    docs = mixed(tmp_path)
    assert docs.sources == ("big", "small", "one")
    for size, expected in ((0.1, [100, 2, 0]), (0.001, [1, 1, 0]), (12, [6, 6, 0]), (30, [20, 10, 0])):
        train, held = docs.split(size, seed=0)
        assert sorted(contents(train) + contents(held)) == sorted(contents(docs))
        starts = [row for row in contents(held) if row[1] == row[0]]  # first pieces carry the number of the source
        assert [sum(row[0] == s for row in starts) for s in range(3)] == expected
        heads = {row[2] for row in starts if row[0] == 0}  # a document's pieces go together
        assert all(
            any(row[1] - row[0] > 2 for row in contents(held)) and row[1] - 7 in heads
            for row in contents(held)
            if row[0] == 0 and row[1] > 9
        )
    again, other = docs.split(0.1, seed=0)[1], docs.split(0.1, seed=1)[1]
    assert contents(again) == contents(docs.split(0.1, seed=0)[1]) != contents(other)
    assert len({docs.fingerprint, again.fingerprint, other.fingerprint, docs.split(0.1, seed=0)[0].fingerprint}) == 4
    with pytest.raises(DataError, match="cannot hold 900 out of 1021 documents"):
        docs.split(900, seed=0)
    assert "one    no documents" in again.report() and "trained" in again.report()


def test_weights(tmp_path):
    docs = mixed(tmp_path, big=0.5, small=2.5)
    rows_of = contents(docs)
    epochs = [docs.take(e) for e in range(3)]
    assert all(np.array_equal(docs.take(e), epochs[e]) for e in range(3))
    for taken in epochs:
        rows = [rows_of[i] for i in taken]
        count = [sum(row[0] == s and row[1] == s for row in rows) for s in range(3)]
        assert count == [500, 50, 1]
        pieces, whole = sum(row[0] == 0 for row in rows), sum(row[0] == 0 for row in rows_of)
        assert abs(pieces / whole - 0.5) < 0.1
    chosen = [set(taken[taken < 1000].tolist()) for taken in epochs]
    assert 0.15 < len(chosen[0] & chosen[1]) / 1000 < 0.45  # anew each epoch: about half of a half stays
    train, held = docs.split(0.1, seed=0)
    assert len(held.take(0)) == len(held) and len(train.take(0)) != len(train)


def test_a_weight_that_takes_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"weight 0\.4 takes none of its 1 documents"):
        mixed(tmp_path, one=0.4).take(0)


def test_names_of_sources(tmp_path):
    tokenizer = tokenizer_for(tmp_path)
    path = write_jsonl(tmp_path / "talk/a.jsonl", [{"text": "x"}])
    several = [source(p, "completion") for p in (path, path, tmp_path / "talk", tmp_path / "talk/*.jsonl")]
    assert make(tmp_path, tokenizer, *several, source(path, "completion", name="mine")).sources == ("a", "a-2", "talk", "talk-2", "mine")


def test_report_counts_replies_that_do_not_end(tmp_path):
    tokenizer = tokenizer_for(tmp_path, "open")
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns("Hi", "Yo")}, {"messages": turns("Hi", "Yo", "b")}])
    report = make(tmp_path, tokenizer, source(path, "chat")).report()
    assert "1 documents end without a trained special token: the model does not learn to stop there" in report
    assert "2 documents, " in report and "% trained, length mean " in report


# ------------------------------------------------------------------------------------------------------------------ cache


class Counter:
    """How often text was tokenized."""

    def __init__(self, monkeypatch):
        self.calls = 0
        real = module._tokenize

        def counted(*args):
            self.calls += 1
            return real(*args)

        monkeypatch.setattr(module, "_tokenize", counted)


def test_cache_is_keyed_by_content(tmp_path, monkeypatch):
    counter = Counter(monkeypatch)
    tokenizer = tokenizer_for(tmp_path, "chatml")
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns("Hi", "Yo there")}, {"messages": turns("Hi", "Yo", "a", "b")}])

    def of(path=path, tokenizer=tokenizer, keys=None, **more):
        before = counter.calls
        docs = make(tmp_path, tokenizer, source(path, "chat", **(keys or {})), **more)
        return docs, counter.calls - before

    first, made = of()
    assert made == 1
    for again in (
        of(),
        of(tokens=64, max_length=12, overflow="split"),
        of(keys={"weight": 2.0, "name": "x"}),
        of(tokenizer=tokenizer_for(tmp_path / "t", "chatml")),
    ):
        assert again[1] == 0  # none of it changes tokens
    moved = write_jsonl(tmp_path / "elsewhere/b.jsonl", [])
    moved.write_bytes(path.read_bytes())
    docs, made = of(moved)
    assert made == 0 and docs.fingerprint == first.fingerprint and contents(docs) == contents(first)
    assert of(max_length=12, overflow="split")[0].fingerprint != first.fingerprint
    for changed in (
        {"tokenizer": tokenizer_for(tmp_path / "u", "gemma")},
        {"keys": {"train_on": "last"}},
        {"keys": {"roles": {"bot": "assistant"}}},
        {"template_args": {"x": 1}},
        {"date": "2025-01-01"},
    ):
        assert of(**changed)[1] == 1 and of(**changed)[1] == 0
    with open(path, "a") as file:
        file.write(json.dumps({"messages": turns("c", "d")}) + "\n")
    docs, made = of()
    assert made == 1 and len(docs) == 3 and docs.fingerprint != first.fingerprint
    monkeypatch.setattr(module, "CODE_VERSION", 999)
    assert of()[1] == 1


@pytest.mark.parametrize("name", ["tokens.bin", "index.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_damaged_caches_are_made_again(tmp_path, monkeypatch, capfd, name, damage):
    counter = Counter(monkeypatch)
    tokenizer, path = tokenizer_for(tmp_path), write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in CORPUS])
    first = make(tmp_path, tokenizer, source(path, "completion"))
    expected = contents(first)
    file = next((tmp_path / "cache").glob(f"*/{name}"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.unlink()
    if damage != "gone":
        file.write_bytes({"flip": data, "cut": data[:-3], "empty": b""}[damage])
    docs = make(tmp_path, tokenizer, source(path, "completion"))
    harmless = name == "meta.json" and damage == "flip" and counter.calls == 1
    assert contents(docs) == expected and docs.fingerprint == first.fingerprint
    assert harmless or (counter.calls == 2 and "damaged; tokenizing again" in capfd.readouterr().err)
    assert make(tmp_path, tokenizer, source(path, "completion")).fingerprint == first.fingerprint and counter.calls <= 2
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the store and its lock, nothing left over


def _prepare_in_a_process(tmp_path, queue):
    count = []
    real = module._tokenize
    module._tokenize = lambda *args: (count.append(1), time.sleep(0.3), real(*args))
    docs = make(tmp_path, Tokenizer.load(tmp_path), source(tmp_path / "a.jsonl", "completion"))
    queue.put((len(count), docs.fingerprint, len(docs)))


def test_processes_take_turns(tmp_path):
    tokenizer_for(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in CORPUS])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_prepare_in_a_process, args=(tmp_path, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(made for made, _, _ in results) == [0, 0, 0, 1] and len({result[1:] for result in results}) == 1


def test_what_a_killed_process_left_is_removed(tmp_path):
    tokenizer, path = tokenizer_for(tmp_path), write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    context = multiprocessing.get_context("fork")

    def die():
        module._tokenize = lambda *args: os.kill(os.getpid(), 9)
        make(tmp_path, tokenizer, source(path, "completion"))

    process = context.Process(target=die)
    process.start()
    process.join()
    assert process.exitcode == -9 and len(list((tmp_path / "cache").glob("*.tmp"))) == 1
    assert len(make(tmp_path, tokenizer, source(path, "completion"))) == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_cache_that_cannot_be_written(tmp_path):
    tokenizer, path = tokenizer_for(tmp_path), write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cache: the cache cannot be written: .*; set data.cache to another folder"):
        make(tmp_path, tokenizer, source(path, "completion"))


def test_memory_is_bounded(tmp_path, monkeypatch):
    """A template that keeps many strings, none of them too long: an error for its record."""
    monkeypatch.setattr(module, "MEMORY", 256 << 20)
    keep = "{% set ns = namespace(s=[]) %}{% for i in range(999) %}{% set ns.s = ns.s + ['x' * 8000000 ~ i] %}{% endfor %}"
    tokenizer = tokenizer_for(tmp_path / "model", keep)
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns("Hi", "Hello!")}])
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(DataError, match=r"a\.jsonl:1: the chat template needs too much memory"):
        make(tmp_path, tokenizer, source(path, "chat"))
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    monkeypatch.setattr(module, "MEMORY", 4 << 30)
    assert len(make(tmp_path, tokenizer_for(tmp_path / "good", "chatml"), source(path, "chat"))) == 1


def test_long_names_and_repeated_keys_are_told_shortly(tmp_path):
    tokenizer = tokenizer_for(tmp_path / "model", "chatml")
    begun = time.process_time()
    for number, text in enumerate(
        (json.dumps({"x" * 100_000: 1}), "{" + "".join(f'"k{i}": 1, ' for i in range(200_000)) + '"k199999": 2}')
    ):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(text)
        with pytest.raises(DataError, match=r":1: (has no field|is not valid JSON: key 'k199999' appears twice)") as error:
            make(tmp_path, tokenizer, source(path, "completion"))
        assert len(str(error.value)) < 400
    assert time.process_time() - begun < 5
