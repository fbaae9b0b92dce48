"""The plan of a run: every document, in packs that depend on nothing but the data, the seed and the epoch."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
import torch

from data.batch import IGNORE
from data.documents import Documents
from data.stream import Stream
from runtime.errors import ConfigError
from tests.data.making import CORPUS, tokenizer_for, turns, write_jsonl
from tests.data.test_prepare import make, source


def numbered(tmp_path, counts: dict[str, int], weights: dict[str, float] | None = None, **keys) -> Documents:
    """Documents whose ids tell source, document and place apart."""
    sources = []
    for s, (name, count) in enumerate(counts.items()):
        rng = np.random.default_rng(s)
        rows = [{"input_ids": [(s * 10_000 + d) * 100 + t for t in range(rng.integers(2, 40))]} for d in range(count)]
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        sources.append(source(path, "tokenized", weight=(weights or {}).get(name, 1.0)))
    return make(tmp_path, tokenizer_for(tmp_path), *sources, **{"tokens": 64, **keys})


def ids_of(batch) -> list[int]:
    """The ids of a batch's documents, without padding."""
    return batch.tokens[: batch.filled].tolist()


def documents_of(batch) -> list[tuple[int, ...]]:
    borders = batch.cu_seqlens.tolist()
    return [tuple(batch.tokens[a:b].tolist()) for a, b in pairwise(borders) if a < batch.filled]


def test_a_batch_is_its_documents(tmp_path):
    docs = numbered(tmp_path, {"a": 100, "b": 30})
    pad = docs.pad_id
    stream = Stream(docs, 64, 64, seed=0)
    shapes = set()
    for step in range(1, stream.steps_per_epoch + 1):
        (batch,) = stream.take(step)
        T, N = 64, stream.max_docs
        assert (batch.tokens.dtype, batch.labels.dtype, batch.positions.dtype) == (torch.int64, torch.int64, torch.int32)
        assert batch.cu_seqlens.dtype == torch.int32 and batch.group["source"].dtype == torch.int64 and batch.max_seqlen == 64
        shapes.add((batch.tokens.shape, batch.labels.shape, batch.positions.shape, batch.cu_seqlens.shape, batch.group["source"].shape))
        assert shapes == {((T,), (T,), (T,), (N + 1,), (N,))}
        borders = batch.cu_seqlens.tolist()
        assert borders[0] == 0 and borders[-1] == T and borders == sorted(borders) and batch.filled in borders
        for n, (a, b) in enumerate(pairwise(borders)):
            ids, labels = batch.tokens[a:b].tolist(), batch.labels[a:b].tolist()
            assert batch.positions[a:b].tolist() == list(range(b - a))
            if a >= batch.filled:
                assert set(ids) <= {pad} and set(labels) <= {IGNORE} and batch.group["source"][n] == -1
            else:
                assert ids == list(range(ids[0], ids[0] + b - a)) and ids[0] % 100 == 0
                assert labels == [*ids[1:], IGNORE] and batch.group["source"][n] == ids[0] // 1_000_000
        assert batch.learned() == sum(label != IGNORE for label in batch.labels.tolist())


@pytest.mark.parametrize("weights", [{}, {"a": 2.0}, {"a": 0.5}, {"a": 2.5, "b": 0.3}], ids=str)
def test_an_epoch_takes_what_weights_say(tmp_path, weights):
    docs = numbered(tmp_path, {"a": 200, "b": 50}, weights)
    stream = Stream(docs, 64, 64, seed=3, size=2, accumulate=2)
    ranks = [Stream(docs, 64, 64, seed=3, rank=r, size=2, accumulate=2) for r in range(2)]
    expected = {s: weights.get(name, 1.0) * n for s, (name, n) in enumerate({"a": 200, "b": 50}.items())}
    seen = []
    for epoch in range(3):
        taken: dict[int, list] = {0: [], 1: []}
        for step in range(stream.steps(epoch) + 1, stream.steps(epoch + 1) + 1):
            for rank in ranks:
                for batch in rank.take(step):
                    for document in documents_of(batch):
                        taken[document[0] // 1_000_000].append(document)
        assert {s: len(found) for s, found in taken.items()} == expected
        for s, found in taken.items():
            often = np.unique([f[0] for f in found], return_counts=True)[1]
            assert set(often) <= {int(expected[s] // (200, 50)[s]), -int(-expected[s] // (200, 50)[s])}
        seen.append(tuple(taken[0]))
    assert len(set(seen)) == 3  # another order every epoch
    assert stream.steps(1) == stream.steps_per_epoch


def test_steps_do_not_depend_on_the_layout(tmp_path):
    """4 packs a step, however they are cut over ranks and accumulation, at any step and in any order of asking."""
    docs = numbered(tmp_path, {"a": 150, "b": 60}, {"b": 0.5})
    layouts = [(1, 4), (2, 2), (4, 1)]
    steps = [1, 2, 40, 7, 23, 61]
    plans = []
    for size, accumulate in layouts:
        ranks = [Stream(docs, 64, 64, seed=1, rank=r, size=size, accumulate=accumulate) for r in range(size)]
        plan = {}
        for step in steps:
            taken = {(i, r): b for r, rank in enumerate(ranks) for i, b in enumerate(rank.take(step))}
            assert all(b.pack == ((step - 1) * accumulate + i) * size + r for (i, r), b in taken.items())
            batches = sorted(taken.values(), key=lambda b: b.pack)
            assert [b.pack for b in batches] == list(range(4 * (step - 1), 4 * step))
            plan[step] = [ids_of(b) for b in batches]
        plans.append(plan)
        assert len({(r.steps_per_epoch, r.fill, r.max_docs, r.packs_per_step) for r in ranks}) == 1
    assert plans[0] == plans[1] == plans[2] and any(plans[0][61])
    assert steps[-1] > Stream(docs, 64, 64, seed=1, size=4).steps(2)  # more than one epoch was looked at


def test_resuming_is_a_number(tmp_path):
    docs = numbered(tmp_path, {"a": 80}, {"a": 1.5})
    whole, resumed = Stream(docs, 64, 64, seed=0, size=2, accumulate=3, rank=1), Stream(docs, 64, 64, seed=0, size=2, accumulate=3, rank=1)
    last = whole.steps(3)
    batches = {step: [ids_of(b) for b in whole.take(step)] for step in range(1, last + 1)}
    middle = last // 2
    for step in range(middle, last + 1):
        assert [ids_of(b) for b in resumed.take(step)] == batches[step]


def test_seeds_and_no_shuffling(tmp_path):
    docs = numbered(tmp_path, {"a": 150})

    def of(**keys):
        stream = Stream(docs, 64, 64, **keys)
        return [ids_of(stream.take(step)[0]) for step in range(1, stream.steps_per_epoch + 1)]

    assert of(seed=0) == of(seed=0) != of(seed=1) != of(seed=0, shuffle=False) == of(seed=1, shuffle=False)
    lengths = [len(d) for d in docs.lengths.tolist() and [docs.read(i)[0] for i in range(len(docs))]]
    assert sum(len(ids) for ids in of(seed=0)) == sum(lengths)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_fewer_documents_than_ranks(tmp_path, count):
    """Every rank makes the same number of steps; packs that are missing are empty."""
    docs = numbered(tmp_path, {"a": count}, max_length=16, overflow="truncate")
    ranks = [Stream(docs, 64, 16, seed=0, rank=r, size=4, accumulate=2) for r in range(4)]
    assert {r.steps_per_epoch for r in ranks} == {1} and ranks[0].fill > 0
    batches = [b for r in ranks for b in r.take(1)]
    assert sum(len(documents_of(b)) for b in batches) == count and len({b.cu_seqlens.shape for b in batches}) == 1
    for b in batches:
        assert int(np.diff(b.cu_seqlens.numpy()).max()) <= b.max_seqlen == 16  # padding, too, is no longer than a document may be
    empty = [b for b in batches if b.filled == 0]
    assert len(empty) >= 8 - count and all(b.learned() == 0 and set(b.tokens.tolist()) == {docs.pad_id} for b in empty)
    assert "of which" in ranks[0].report()


def test_a_stream_for_longer_documents_than_it_has_room(tmp_path):
    with pytest.raises(ConfigError, match="tokens=32 is less than the 64 tokens a document may have"):
        Stream(numbered(tmp_path, {"a": 3}), 32, 32, seed=0)


def test_report_and_preview(tmp_path, monkeypatch):
    tokenizer = tokenizer_for(tmp_path, "chatml")
    talk = write_jsonl(tmp_path / "talk.jsonl", [{"messages": turns("Hi", "Yo \x1b[31mthere")}] * 3)
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": t} for t in CORPUS[:3]])
    docs = make(tmp_path, tokenizer, source(talk, "chat"), source(text, "completion"), tokens=128)
    stream = Stream(docs, 128, 128, seed=0, size=3)
    packs = r"3 packs of 128 tokens, of which 1 empty, \d+\.\d % full, at most \d documents in one"
    assert re.fullmatch(packs + "; 1 steps an epoch of 3 packs", stream.report())
    preview = stream.preview(tokenizer, documents=9)
    shown = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yo \\x1b[31mthere<|im_end|>⟧\n"
    assert shown in preview and "\x1b" not in preview and "tokens from talk\n" in preview
    assert preview.count("--- pack ") == 2 and preview.count(" tokens from ") == 6
    assert stream.preview(tokenizer, documents=2).count(" tokens from ") == 2
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    coloured = stream.preview(tokenizer, documents=1, characters=40)
    assert "\033[1;32m" in coloured and "⟦" not in coloured and " ..." in coloured
