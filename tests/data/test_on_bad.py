"""Records that are wrong and left out: within a limit, counted by reason, named by line; the others stay what they are."""

from __future__ import annotations

import json

import pytest

from data.sources import read_records
from runtime.errors import DataError
from tests.data.making import tokenizer_for
from tests.data.test_prepare import ids_and_targets, make, source

GOOD = [json.dumps({"text": f"text {i}"}).encode() for i in range(20)]
BAD = {  # line, as it is counted in the file -> what is wrong with it
    3: (b'{"text" "cut"}', "is not valid JSON: expecting ':' delimiter (column 9)"),
    5: (b'{"text": "\xff"}', "byte 0xff at column 11 is not UTF-8; convert the file"),
    8: (b'{"txt": "x"}', "has no field 'text' (it has 'txt'); names can be set with fields"),
    9: (b'{"text": "\\ud83d"}', "has \\ud83d, half of a surrogate pair, which is not text"),
    13: (b'{"text": 1}', "field 'text' must be a string, got a number"),
    22: (b'{"text", 1}', "is not valid JSON: expecting ':' delimiter (column 8)"),
}


@pytest.fixture
def tokenizer(tmp_path):
    return tokenizer_for(tmp_path / "model")


def mixed(path):
    """GOOD lines with the BAD ones at their places."""
    lines = list(GOOD)
    for number, (line, _) in sorted(BAD.items()):
        lines.insert(number - 1, line)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_what_is_left_are_the_good_records(tmp_path, tokenizer):
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(GOOD))
    want = make(tmp_path, tokenizer, source(tmp_path / "good.jsonl", "completion"))
    docs = make(tmp_path, tokenizer, source(mixed(tmp_path / "a.jsonl"), "completion"), on_bad="skip", max_bad=0.25)
    assert len(docs) == len(want) == 20
    assert [ids_and_targets(docs, i) for i in range(20)] == [ids_and_targets(want, i) for i in range(20)]
    assert docs.about(19, tokenizer) | {"where": "", "source": ""} == want.about(19, tokenizer) | {"where": "", "source": ""}
    assert docs.about(19, tokenizer)["where"] == f"{tmp_path / 'a.jsonl'}:26", "documents keep the lines they came from"
    report = docs.report()
    assert "6 of 26 records are wrong: left out (data.on_bad)" in report
    assert "2 x is not valid JSON: expecting ':' delimiter (column N)" in report
    assert "first: " + ", ".join(f"{tmp_path / 'a.jsonl'}:{line}" for line in sorted(BAD)[:5]) + "\n" in report + "\n"
    assert "wrong" not in want.report()
    again = make(tmp_path, tokenizer, source(tmp_path / "a.jsonl", "completion"), on_bad="skip", max_bad=0.25)
    assert again.report() == report, "the cache says so, too"


def test_stopping_is_the_default_and_no_cache_of_skipping_hides_it(tmp_path, tokenizer):
    where = source(mixed(tmp_path / "a.jsonl"), "completion")
    make(tmp_path, tokenizer, where, on_bad="skip", max_bad=0.25)
    with pytest.raises(DataError) as error:
        make(tmp_path, tokenizer, where)
    assert str(error.value) == f"{tmp_path / 'a.jsonl'}:3: {BAD[3][1]}"


def test_each_kind_is_an_error_by_itself(tmp_path, tokenizer):
    for line, reason in BAD.values():
        (tmp_path / "one.jsonl").write_bytes(GOOD[0] + b"\n" + line + b"\n")
        with pytest.raises(DataError) as error:
            make(tmp_path, tokenizer, source(tmp_path / "one.jsonl", "completion"))
        assert str(error.value) == f"{tmp_path / 'one.jsonl'}:2: {reason}"


def test_the_limit(tmp_path, tokenizer):
    where = source(mixed(tmp_path / "a.jsonl"), "completion")
    told = f"{tmp_path / 'a.jsonl'}:3: {BAD[3][1]}; 6 of 26 records are wrong, more than data.max_bad="
    for most in (0.0, 0.001, 0.23):
        with pytest.raises(DataError) as error:
            make(tmp_path, tokenizer, where, on_bad="skip", max_bad=most)
        assert str(error.value).startswith(f"{told}{most:g} "), "tokenized, or found in the cache"
    assert len(make(tmp_path, tokenizer, where, on_bad="skip", max_bad=6 / 26)) == 20


def test_nothing_but_wrong_records(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(line for line, _ in BAD.values()))
    with pytest.raises(DataError, match=r"a.jsonl:1: .*; 6 of 6 records are wrong"):
        make(tmp_path, tokenizer, source(tmp_path / "a.jsonl", "completion"), on_bad="skip", max_bad=0.99)


def test_rows_of_csv_and_faults_in_the_structure(tmp_path):
    told = []
    (tmp_path / "a.csv").write_text("text,other\na,b\nc\nd,e,f\ng,h\n")
    assert [r.value["text"] for r in read_records(tmp_path / "a.csv", told.append)] == ["a", "g"]
    assert [error.line for error in told] == [3, 4]
    for name, text in (("b.json", '[{"text": "a"}, {"text": }]'), ("b.csv", 'text\n"a"b\n'), ("c.csv", "text,text\na,b\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError):
            list(read_records(tmp_path / name, told.append))
    assert len(told) == 2


def test_kinds_of_reasons_are_bounded(tmp_path, tokenizer):
    rows = [json.dumps({"x" * (1 + i): 1}).encode() for i in range(50)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows + GOOD * 3))
    docs = make(tmp_path, tokenizer, source(tmp_path / "a.jsonl", "completion"), on_bad="skip", max_bad=0.5)
    assert docs.origins[0].store.bad["reasons"]["other reasons"] == 30
    assert sum(docs.origins[0].store.bad["reasons"].values()) == 50
    assert len(docs.report().splitlines()) < 30


@pytest.mark.parametrize("form", ["completion", "chat"])
def test_a_record_that_is_nested_too_deeply_is_a_wrong_record(tmp_path, form):
    """Deep values reach recursive code where they are well-formed: in a field that nothing looks at, or in one that templates get."""
    deep, deepest = ("[" * n + "]" * n for n in (600, 61))

    def line(extra: str) -> str:
        if form == "completion":
            return f'{{"text": "x", "more": {extra}}}'
        return f'{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": "x", "extra": {extra}}}]}}'

    tokenizer = tokenizer_for(tmp_path / "model", "chatml")
    (tmp_path / "a.jsonl").write_text(f"{line('1')}\n{line(deepest)}\n{line(deep)}\n")
    with pytest.raises(DataError, match=r"a.jsonl:3: is nested too deeply; 64 levels are the most"):
        make(tmp_path, tokenizer, source(tmp_path / "a.jsonl", form))
    docs = make(tmp_path, tokenizer, source(tmp_path / "a.jsonl", form), on_bad="skip", max_bad=0.5)
    assert len(docs) == 2 and "1 of 3 records are wrong" in docs.report()


@pytest.mark.parametrize("field", ["tools", "arguments"])
def test_json_in_a_string_is_not_nested_too_deeply_either(tmp_path, field):
    deep = '{"a":' * 65 + "1" + "}" * 65
    call = {"function": {"name": "f", "arguments": deep if field == "arguments" else "{}"}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x", "tool_calls": [call]}]
    record = {"messages": messages} | ({"tools": f"[{deep}]"} if field == "tools" else {})
    tokenizer = tokenizer_for(tmp_path / "model", "chatml")
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(DataError, match=f"a.jsonl:1: .*field '{field}' is a string, but not a"):
        make(tmp_path, tokenizer, source(tmp_path / "a.jsonl", "chat"))
