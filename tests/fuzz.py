"""Damaged and hostile inputs: each is loaded as what it says, or refused in one line; nothing crashes, hangs or fills the memory.

    python -m tests.fuzz --configs 10000 --data 5000 --safetensors 10000 --templates 500 --tokenizers 10000 --adapters 10000
        --checkpoints 10000 [--seed 0] [--out FILE]

Seven kinds of input, each made from good ones by `random.Random(f"{seed} {kind} {number}")`, so that any single case can be made again
(`--first NUMBER`):

    configs       TOML of runs: values, keys, tables, lines and characters changed, overrides added. Checked as far as before a run's ranks
                  connect. Loaded: every leaf that an independent parse finds is in the config with that value.
    data          .jsonl, .json, .csv and .txt of every format: values, keys, bytes and lines changed; what is wrong is an error or left
                  out. Loaded: every document decodes to the text that `expected` writes of an independent parse of its record, and
                  trains what that says.
    safetensors   files and indices of a model: header, header's length, end of the file, names, links. Loaded: every parameter equals
                  the bytes that an independent parse of the file finds for it.
    templates     chat templates: pieces cut, doubled and mixed, expressions that are wrong, and that would take all memory or time.
                  Loaded: a text of bounded size, and what is trained of it holds every trained message.
    tokenizers    tokenizer.json and the configs beside it: values, keys, bytes, repeated keys; one of the files a pipe, a device, a folder
                  or a link. Loaded: no link led out of the folder, templates and ends of turns are those that the files say, and where
                  only tokenizer.json changed, texts become what the library alone makes of them.
    adapters      adapter_config.json and the weights of an adapter, changed likewise. Loaded: rank and scale are those of the config, which
                  asks for nothing that is not computed, and every parameter equals the bytes that the file has for it.
    checkpoints   of one rank and of two, one file of the newest changed and sealed again with a right size, crc32 and manifest, as whoever
                  knows the format would: metadata, tensors, random state, state.json, manifest; a folder of another step; pipes and
                  links, beside it too. Read by the calls of a run. Loaded, that one or, where the reason is said, the one before it: every
                  element of every tensor (NaN before), the state and the random state are what an independent parse finds, no code ran,
                  and outside of the run's folder all is as before.

Cases run in a child process that may have `MEMORY` more address space than it starts with (templates, `TEMPLATES_MEMORY`). This process
watches it: a case that takes longer than `LIMIT_S` is a hang, a child that dies is a crash; either way the next child goes on with the
next case. A case that raises anything but UserError, or one of more than a line, is a traceback. One that loads as something else is a
wrong load.

`--out` replaces the kinds that were run in a file that may hold others; each says what made it, when and of which commit.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import mmap
import os
import platform
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import tomllib
import torch
import torch.distributed as dist
from tokenizers import Tokenizer as Pipeline
from torch.distributed.tensor import DTensor

from benchmarks.cpu import commit
from data import formats
from data import prepare as preparing
from data.config import DataConfig, SourceConfig
from data.formats.instruct import ALPACA, ALPACA_INPUT
from data.prepare import prepare
from data.sample import TRAINED
from data.text import MAX_OUTPUT
from data.tokenizer import Tokenizer
from model.arch import Arch
from model.config import LoraConfig
from model.peft_format import CONFIG, PREFIX, STEM
from model.safetensors_io import export_adapter, load_adapter, load_weights, materialize
from model.tensor_folder import fingerprint
from model.transforms.lora import is_adapter
from model.weights import NameMap
from parallel.apply import check
from parallel.local import run as on_ranks
from parallel.mesh import sizes
from runtime.checkpoint import Checkpointer
from runtime.config import flatten, load, to_toml
from runtime.errors import ModelError, UserError
from runtime.sections import CheckpointConfig
from tests import resealed, tiny
from tests.data import making
from tests.model.folders import prepared, train_a_little, write_model
from tests.runtime.saving import spread
from train import DRIFT, RunConfig, restore_random

LIMIT_S = 5.0  # of processor time
ASLEEP_S = 60.0  # of the clock, for what waits instead
MEMORY = 2 << 30
TEMPLATES_MEMORY = preparing.MEMORY + MEMORY  # so that the product's own limit is reached first
ROOT = Path(__file__).parents[1]


class Wrong(AssertionError):
    """An input was loaded as something that it does not say."""


Case = Callable[[random.Random, Path], None]


# ----------------------------------------------------------------------------------------------------------------- configs

KEYS = ["model", "data", "sources", "lora", "rank", "schedule", "kind", "extends", "a-b", '"q k"', "'l'", "é", "0", "''", "async", "roles"]
VALUES = [
    "1", "-1", "1e400", "nan", "-inf", "0x"+"f" * 40, "9" * 30, "1979-05-27T07:32:00Z", "07:32:00", "1979-05-27", "true", '"x"', "'x'",
    '""', '"\\u0000"', '"""a\nb"""', "[]", "[1, 'a']", "[[[]]]", "{}", "{a = 1}", "{kind = 'cosine'}", "[{}]", "[{path = 'x'}, 3]",
    "[" * 70+"]" * 70, "{a=" * 70+"1"+"}" * 70, "9223372036854775807", "-9223372036854775808", "0", "1e-320", "x", "", '"unterminated',
    "[1,", "{a = ", "1__0", "0b2", "'\x00'", '"\\ud800"', "é", "2", "0.5", "1e308", '"none"', '"auto"', '"*"',
]  # fmt: skip
NOISE = ["", "\\", '"', "'", "=", ".", "[", "]", "{", "}", ",", "#", "\x00", "\x85", "😀", "\r", "\n", "é", "\ufeff"]


def damaged_toml(rng: random.Random, texts: list[str]) -> bytes:
    """One of the texts with one to three edits of lines, now and then a byte that is no UTF-8."""
    lines, others = rng.choice(texts).splitlines(), rng.choice(texts).splitlines()
    for _ in range(rng.choice((1, 1, 2, 3))):
        i = rng.randrange(len(lines))
        kind = rng.randrange(12)
        if kind > 8:  # the value that the key has elsewhere, or a number near its own
            same = [line for line in others if line.split(" = ")[0] == lines[i].split(" = ")[0]]
            lines[i] = rng.choice(same) if same else re.sub(r"\d", lambda _: str(rng.randrange(10)), lines[i], count=1)
            continue
        if kind in (0, 1):  # another value
            lines[i] = f"{lines[i].split(' = ')[0]} = {rng.choice(VALUES)}"
        elif kind == 2:  # another key
            lines[i] = f"{'.'.join(rng.choices(KEYS, k=rng.randrange(1, 4)))} = {rng.choice(VALUES)}"
        elif kind == 3:  # another table
            name = ".".join(rng.choices(KEYS, k=rng.randrange(1, 4)))
            lines.insert(i, rng.choice((f"[{name}]", f"[[{name}]]", f"[[{name}]", f"[{name}")))
        elif kind == 4:  # lines moved or doubled
            lines.insert(rng.randrange(len(lines)), lines[i])
        elif kind == 5:
            del lines[i]
            lines = lines or [""]
        else:  # characters changed
            at = rng.randrange(len(lines[i]) + 1)
            lines[i] = lines[i][:at] + rng.choice(NOISE) + lines[i][at + rng.randrange(2) :]
    data = "\n".join(lines).encode()
    if rng.random() < 0.05:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + bytes([rng.randrange(256)]) + data[at:]
    return data


def configs(folder: Path) -> Case:
    arch = Arch.from_folder(tiny.write_model(folder / "model"))
    files = [path for path in sorted((ROOT / "train_configs").rglob("*.toml")) if "arch" not in path.parts]
    texts = [to_toml(load(RunConfig, path)) for path in files]
    texts += [text for path in files if "extends" not in (text := path.read_text(encoding="utf-8"))]
    names = list(flatten(load(RunConfig, files[0])))

    def case(rng: random.Random, here: Path) -> None:
        data = damaged_toml(rng, texts)
        (here / "x.toml").write_bytes(data)
        overrides = [f"--{rng.choice(names)}={rng.choice(VALUES)}" for _ in range(rng.choice((0, 0, 0, 0, 0, 1, 2)))]
        cfg = load(RunConfig, here / "x.toml", overrides)
        found = flatten(cfg)
        if not overrides:
            for key, value in flatten(tomllib.loads(data.decode("utf-8-sig"))).items():
                if value in ({}, []) and key not in found:  # an empty table
                    continue
                value = float(value) if type(found.get(key)) is float and type(value) is int else value
                if key not in found or found[key] != value or type(found[key]) is not type(value):
                    raise Wrong(f"{key} is {value!r} in the file and {found.get(key)!r} in the config")
        (here / "again.toml").write_text(to_toml(cfg), encoding="utf-8")
        if load(RunConfig, here / "again.toml") != cfg:
            raise Wrong("its own text gives another config")
        check(cfg, sizes(cfg.parallel, rng.choice((1, 2, 8))), arch, cfg.lora)

    return case


# -------------------------------------------------------------------------------------------------------------------- data

WORDS = [
    "hello",
    " world",
    "\n",
    "naïve ",
    "東京",
    "😀",
    "<|im_end|>",
    "<|im_start|>",
    "{{ x }}",
    "\\",
    '"',
    "\t",
    "a" * 40,
    "  ",
    "\u2028",
]
JUNK = [None, True, "a\nb", 0, 1, -1, 1.5, 10**30, "", "x", [], {}, [[]], {"a": 1}, "\ud800", "\x00", [None], "assistant", {"role": "user"}]
FIELDS = [
    "messages",
    "role",
    "content",
    "weight",
    "text",
    "input_ids",
    "labels",
    "mask",
    "instruction",
    "input",
    "output",
    "x",
    "attention_mask",
]
PIECES = [
    b"", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\n\n", b"\x00", b"\xff", b"\xc3", b"NaN", b"-Infinity", b"1e999", b"[" * 5000,
    b'{"a":' * 2000, b'"\\ud800"', b'"\\udc00\\ud800"', b",", b"}", b"]", b'"', b"\\", b" ", b"\xe2\x80\xa8", b"9" * 5000,
    b'"messages": [], ', b'"text": "y", ', b"null", b"{}", b"\x1a", b"\xed\xa0\x80", b"\xf4\x90\x80\x80",
]  # fmt: skip


def record(rng: random.Random, form: str) -> dict:
    def text() -> str:
        return "".join(rng.choices(WORDS, k=rng.randint(1, 6)))

    if form == "chat":
        roles = rng.choice((["user", "assistant"], ["system", "user", "assistant"], ["human", "gpt"] * 2, ["user", "assistant"] * 3))
        return {"messages": [{"role": role, "content": text()} for role in roles]}
    if form == "instruct":
        return {"instruction": text(), "output": text()} | ({"input": text()} if rng.random() < 0.5 else {})
    if form == "completion":
        return {"text": text()}
    ids = [rng.randrange(300) for _ in range(rng.randint(1, 9))]
    more = rng.choice(({}, {"labels": [rng.choice((i, -100)) for i in ids]}, {"mask": [rng.randrange(2) for _ in ids]}))
    return {"input_ids": ids, **more}


def damaged_value(rng: random.Random, value: object) -> object:
    """One change somewhere in a JSON value."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.75:
        if isinstance(value, list):
            i = rng.randrange(len(value))
            kind = rng.randrange(5)
            rest = value[:i] + value[i + 1 :]
            return rest if kind == 0 else [*value, value[i]] if kind == 1 else [*value[:i], damaged_value(rng, value[i]), *value[i + 1 :]]
        key = rng.choice(list(value))
        kind = rng.randrange(6)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {rng.choice(FIELDS) if k == key else k: v for k, v in value.items()}
        if kind == 2:
            return {**value, rng.choice(FIELDS): rng.choice(JUNK)}
        return value | {key: damaged_value(rng, value[key])}
    return rng.choice(JUNK)


def damaged_file(rng: random.Random, form: str) -> tuple[str, bytes]:
    """A suffix and a content."""
    records: list = [record(rng, form) for _ in range(rng.randint(1, 5))]
    while rng.random() < 0.6:
        i = rng.randrange(len(records))
        records[i] = damaged_value(rng, records[i])
    suffix = rng.choice(
        (".jsonl", ".jsonl", ".json", ".csv" if form == "instruct" else ".jsonl", ".txt" if form == "completion" else ".json")
    )
    ascii_only = rng.random() < 0.5 or "\\ud8" in json.dumps(records)
    lines = [json.dumps(value, ensure_ascii=ascii_only) for value in records]
    if suffix == ".csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator=rng.choice(("\n", "\r\n")))
        writer.writerow(["instruction", "input", "output"])
        for value in records:
            known = value if isinstance(value, dict) else {}
            writer.writerow([str(known.get(name, "")).encode(errors="replace").decode() for name in ("instruction", "input", "output")])
        data = out.getvalue().encode()
    elif suffix == ".txt":
        data = str(records[0]).encode(errors="replace")
    elif suffix == ".json" and rng.random() < 0.7:
        data = ("[" + rng.choice((", ", ",\n")).join(lines) + "]").encode()
    else:
        data = "".join(line + rng.choice(("\n", "\n", "\r\n", "\n\n")) for line in lines).encode()
    while rng.random() < 0.35:
        at, cut = rng.randrange(len(data) + 1), rng.choice((0, 0, 1, 5, 10**9 if rng.random() < 0.2 else 0))
        data = data[:at] + rng.choice(PIECES) + data[at + cut :]
    return suffix, data


def parsed(suffix: str, data: bytes) -> list:
    """The records of a file that was accepted."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode()
    if suffix == ".txt":
        return [{"text": text}]
    if suffix == ".csv":
        header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        return [dict(zip(header, row, strict=True)) for row in rows if row]
    if suffix == ".json" and text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def expected(form: str, value: dict) -> tuple[str, str] | list[int]:
    """What a document is to be: its text and the text that trains, or the tokens as the store keeps them.

    An independent account of data/formats/ for what this file makes. KeyError and the like: the record should have been refused.
    """
    if form == "tokenized":
        ids = value["input_ids"]
        trained = [True] * len(ids)
        if value.get("labels") is not None:
            trained = [label != -100 for label in value["labels"]]
        elif value.get("mask") is not None:
            trained = [bool(mark) for mark in value["mask"]]
        trained[0] = False  # nothing comes before it, so nothing predicts it
        return [i + (int(TRAINED) if on else 0) for i, on in zip(ids, trained, strict=True)]
    if form == "completion":
        return value["text"] + "<|im_end|>", value["text"] + "<|im_end|>"
    if form == "instruct":
        prompt = ALPACA_INPUT if value.get("input") else ALPACA
        prompt = prompt.replace("{instruction}", value["instruction"], 1) if not value.get("input") else prompt
        if value.get("input"):
            head, tail = prompt.split("{input}")
            prompt = head.replace("{instruction}", value["instruction"], 1) + value["input"] + tail
        return prompt + value["output"] + "<|im_end|>", value["output"] + "<|im_end|>"
    text = trains = ""
    for message in value["messages"]:
        role = {"human": "user", "gpt": "assistant"}.get(message["role"], message["role"])
        weight, body = message.get("weight"), message["content"] + "<|im_end|>"
        assert role in ("user", "assistant", "system")
        assert weight in (None, 0, 1)
        text += f"<|im_start|>{role}\n{body}\n"
        if weight == 1 and role != "assistant":
            raise AssertionError("outside a generation block")
        if role == "assistant" and weight != 0:
            trains += body
    return text, trains


def data(folder: Path) -> Case:
    tokenizer = Tokenizer.load(tiny.write_model(folder / "model"))
    eos = tokenizer.eos_id

    def case(rng: random.Random, here: Path) -> None:
        form = rng.choice(list(DATA_FORMATS))
        suffix, content = damaged_file(rng, form)
        path = here / f"x{suffix}"
        path.write_bytes(content)
        source = SourceConfig(path=str(path), format=form)
        skip = suffix == ".jsonl" and rng.random() < 0.4  # leave out what is wrong, and train the rest
        cfg = DataConfig(sources=(source,), tokens=1 << 20, on_bad="skip" if skip else "error", max_bad=0.9)
        found = prepare(cfg, (source,), tokenizer, here / "cache", 0, progress=False)
        found.check_vocabulary(1 << 20)
        store = found.origins[0].store
        ends = store.index["end"].tolist()
        documents = [store.tokens[a:b] for a, b in zip([0, *ends], ends)]
        lines = content.split(b"\n")
        records = [parsed(suffix, lines[n - 1])[0] for n in store.index["line"]] if skip else parsed(suffix, content)
        if len(records) != len(documents):
            raise Wrong(f"{len(documents)} documents of {len(records)} records")
        for value, tokens in zip(records, documents):
            try:
                wanted = expected(form, value)
            except Exception as error:
                raise Wrong(f"{value!r} should be refused ({type(error).__name__}: {error})") from None
            if isinstance(wanted, list):
                if tokens.tolist() != wanted:
                    raise Wrong(f"{tokens.tolist()} instead of {wanted}")
                continue
            ids = (tokens & (TRAINED - 1)).tolist()
            trained = [i for i, raw in zip(ids, tokens.tolist()) if raw >= TRAINED]
            got = tokenizer.decode(ids), tokenizer.decode(trained)
            learned = trained == ids[1:] if form == "completion" else _around(got[1], wanted[1])
            if got[0] != wanted[0] or not learned or (form != "chat" and ids[-1] != eos):
                raise Wrong(f"{got} instead of {wanted}")

    return case


DATA_FORMATS = ("chat", "instruct", "completion", "tokenized")


def _around(got: str, wanted: str) -> bool:
    """A token that overlaps a trained span is trained whole, so a few characters of the prompt may come along."""
    return len(got) <= len(wanted) + 8 and wanted in got


# ------------------------------------------------------------------------------------------------------------- safetensors


def damaged_header(rng: random.Random, header: dict) -> dict:
    """One change of the meaning of a safetensors header."""
    name, other = rng.choice(list(header)), rng.choice([key for key in header if key != "__metadata__"])
    entry = dict(header[other])
    kind = rng.randrange(9)
    if kind == 0:
        return {
            rng.choice((other, "model.x", "", "a\nb", "__metadata__", name + "s", "\ud83d")) if k == name else k: v
            for k, v in header.items()
        }
    if kind == 1:
        return {k: v for k, v in header.items() if k != name}
    if kind == 2:
        entry["dtype"] = rng.choice(("F32", "BF16", "F16", "F64", "I32", "BOOL", "U8", "F8_E4M3", "F4", "X", 3, None, "f32"))
    elif kind == 3:
        entry["shape"] = rng.choice(([], [0], [-1], [2**63], [2**32, 2**32], entry["shape"][::-1], [*entry["shape"], 1], [1.5], "x", None))
    elif kind == 4:
        entry["data_offsets"] = rng.choice(([0, 0], [-1, 3], [0, 2**63], [5, 1], [0], "x", None, [0.0, 4.0], [2**64, 2**65]))
    elif kind == 5:
        entry["data_offsets"] = header[rng.choice([key for key in header if key != "__metadata__"])]["data_offsets"]
    elif kind == 6:
        entry = rng.choice((None, [], {}, 3, {**entry, "extra": 1}, {k: v for k, v in entry.items() if k != "dtype"}))
    elif kind == 7:
        return header | {rng.choice(("model.layers.0.extra", "x" * 5000, "../x")): entry}
    else:
        return header | {"__metadata__": rng.choice((None, {}, {"format": 3}, {"format": "tf"}, [], {"a": {"b": "c"}}))}
    return header | {other: entry}


def damaged_weights(rng: random.Random, whole: bytes) -> bytes:
    size = int.from_bytes(whole[:8], "little")
    header, payload = whole[8 : 8 + size], whole[8 + size :]
    kind = rng.randrange(6)
    if kind < 2:
        text = json.dumps(damaged_header(rng, json.loads(header))).encode()
        return len(text).to_bytes(8, "little") + text + payload
    if kind == 2:  # bytes of the header
        header = bytearray(header)
        for _ in range(rng.randint(1, 3)):
            header[rng.randrange(size)] = rng.choice(b'0123456789{}[]",:xF' + bytes([rng.randrange(256)]))
        return whole[:8] + bytes(header) + payload
    if kind == 3:  # its length
        claim = rng.choice((0, 1, size - 1, size + 1, 1 << 27, (1 << 64) - 1, 100_000_001, rng.randrange(1 << 20)))
        return claim.to_bytes(8, "little") + header + payload
    if kind == 4:  # the end of the file
        return whole[: rng.randrange(len(whole))] if rng.random() < 0.7 else whole + bytes(rng.randrange(1, 9))
    deep = b"[" * rng.choice((100, 100_000)) if rng.random() < 0.5 else b'{"a":' * 50_000
    return len(deep).to_bytes(8, "little") + deep + payload


def damaged_index(rng: random.Random, here: Path, index: dict) -> None:
    """Changes model.safetensors.index.json, or what the names in it lead to."""
    path, names = here / "model.safetensors.index.json", index["weight_map"]
    name = rng.choice(list(names))
    kind = rng.randrange(6)
    if kind == 0:
        bad = (
            "../a.safetensors",
            "/etc/passwd",
            "",
            ".",
            "a\\b.safetensors",
            "x\0.safetensors",
            "model.bin",
            "link.safetensors",
            3,
            None,
            [],
        )
        names = names | {
            name: rng.choice((*bad, "fifo.safetensors", "zero.safetensors", "/dev/zero", "a/b.safetensors", "folder.safetensors"))
        }
    elif kind == 1:
        names = {rng.choice(("x", "", "a\r\nb", name + "s")) if k == name else k: v for k, v in names.items()}
    elif kind == 2:
        names = {k: v for k, v in names.items() if k != name}
    elif kind == 3:
        names = names | {name: rng.choice(list(names.values()))}
    text = json.dumps(
        rng.choice(({"weight_map": names}, {"metadata": {}, "weight_map": names}, {"metadata": 3, "weight_map": names}, names))
    )
    if kind == 4:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(NOISE) + text[at + rng.randrange(3) :]
    elif kind == 5:
        text = rng.choice(
            (text[: rng.randrange(len(text))], "[" * 100_000, "[]", '{"weight_map": 3}', text[:-2] + ', "' + name + '": "x"}}', "null")
        )
    path.write_bytes(text.encode(errors="surrogatepass"))
    (here / "link.safetensors").symlink_to("../model/model.safetensors")
    (here / "zero.safetensors").symlink_to("/dev/zero")
    (here / "folder.safetensors").mkdir()
    os.mkfifo(here / "fifo.safetensors")


_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def said(folder: Path, stem: str = "model") -> dict[str, torch.Tensor]:
    """Every tensor of a folder, by an independent reading of its files, in fp32."""
    import numpy as np

    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    where = None if single.exists() else json.loads(index.read_text())["weight_map"]
    found = {}
    for file in {single.name} if where is None else set(where.values()):
        whole = (folder / file).read_bytes()
        size = int.from_bytes(whole[:8], "little")
        for name, entry in json.loads(whole[8 : 8 + size]).items():
            if name == "__metadata__" or (where is not None and where.get(name) != file):
                continue
            begin, end = entry["data_offsets"]
            raw = whole[8 + size + begin : 8 + size + end]
            if entry["dtype"] == "BF16":
                values = np.frombuffer(raw, "<u2").astype("<u4") << 16
                values = values.astype("<u4").view("<f4")
            else:
                values = np.frombuffer(raw, _NUMPY[entry["dtype"]]).astype("<f4")
            found[name] = torch.from_numpy(values.copy()).reshape(entry["shape"])
    return found


def safetensors(folder: Path) -> Case:
    write_model(folder / "model", num_hidden_layers=1)
    net = prepared(folder / "model")
    net.to_empty(device="cpu")
    net.reset_buffers("cpu")
    whole = (folder / "model" / "model.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header, payload = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    parts = {}
    for i in range(2):  # the same model in two files
        mine, text, at = {}, b"", 0
        for name in names[i::2]:
            begin, end = header[name]["data_offsets"]
            mine[name] = header[name] | {"data_offsets": [at, at + end - begin]}
            text, at = text + payload[begin:end], at + end - begin
        front = json.dumps(mine).encode()
        parts[f"model-{i + 1:05d}-of-00002.safetensors"] = len(front).to_bytes(8, "little") + front + text
    index = {"weight_map": {name: list(parts)[i] for i in range(2) for name in names[i::2]}}
    parameters = dict(net.named_parameters())

    def case(rng: random.Random, here: Path) -> None:
        if rng.random() < 0.5:
            (here / "model.safetensors").write_bytes(damaged_weights(rng, whole))
        else:
            broken = rng.choice([None, *parts])
            for name, content in parts.items():
                (here / name).write_bytes(damaged_weights(rng, content) if name == broken else content)
            if broken is None:
                damaged_index(rng, here, index)
            else:
                (here / "model.safetensors.index.json").write_text(json.dumps(index))
        for p in parameters.values():
            p.data.fill_(math.nan)
        load_weights(net, here)
        there, map_ = said(here), NameMap.of(net, set(header))
        for name, p in parameters.items():
            if not torch.equal(p.data, there[map_.to_hf(name)].reshape(p.shape)):
                raise Wrong(f"{name} is not what the file holds")

    return case


# --------------------------------------------------------------------------------------------------------------- templates

BOMBS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", "{{ 'x' * 10 ** 9 }}",
    "{{ 9 ** 9 ** 9 }}", "{{ 'x'|center(10 ** 10) }}", "{{ '%999999999d' % 1 }}", "{{ '{:>999999999}'.format(1) }}",
    "{{ 'x'.ljust(9999999999) }}", "{{ 'x'.zfill(9999999999) }}", "{{ range(99999)|list|string|length }}", "{{ range(10 ** 9)|sum }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ ('x' * 99999).replace('', 'y' * 99999) }}", "{{ 'x' * 99999999999 }}", "{{ [0] * 99999999 }}", "{{ 'a,' * 999999 | length }}",
    "{{ (2 ** 64) ** 64 }}", "{% set x = 2 %}{% for i in range(99) %}{% set x = x * x %}{% endfor %}{{ x }}",
    "{{ 'x'|indent(999999999) }}", "{{ messages|tojson(indent=99999999) }}", "{{ 'x'|wordwrap(1)|urlize }}",
    "{{ ('a' * 50000)|wordwrap(1) }}", "{{ ''.join(['x' * 99999] * 99999) }}",
    "{% set ns = namespace(x=3) %}{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    # one call that nothing interrupts
    "{{ range(99999)|batch(1)|sum(start=[])|length }}", "{{ ([[1] * 90000] * 90000)|sum(start=[])|length }}",
    "{{ ('a' * 16000000)|wordwrap(1) }}", "{{ ('x' * 16000000)|list|sort }}", "{{ ([[range(300)|list] * 300] * 300)|pprint }}",
    "{{ ([[range(300)|list] * 300] * 300)|tojson }}", "{{ ([[range(300)|list] * 300] * 300)|tojson(indent=4) }}",
    "{{ ([[1] * 90000] * 90000)|string }}", "{{ [[1] * 90000] * 90000 }}", "{{ ([[1] * 90000] * 90000) ~ 'x' }}",
    "{{ ([[1] * 90000] * 90000)|sort }}", "{{ (['a' * 1000000] * 1000000)|join }}",
    "{{ ('a' * 999999 ~ 'c') in (['a' * 999999 ~ 'b'] * 999999) }}",
    "{{ ('a' * 8000000).rfind('b' ~ 'a' * 4000000) }}", "{{ ('a' * 16000000).strip('b' * 8000000 ~ 'a') }}",
    "{{ ('a' * 16000000)|trim('b' * 8000000 ~ 'a') }}", "{{ 1.5|round(10 ** 9) }}", "{{ strftime_now('%999999999Y') }}",
    "{{ '%*d' % (999999999, 1) }}", "{{ '{:{}}'.format(1, 9 ** 9) }}", "{{ ('{0}' * 99999).format('x' * 999999) }}",
    "{{ range(99999)" + "|select" * 100 + "|list|length }}", "{{ range(99999)|map('replace', '', 'b' * 999999)|list|length }}",
    "{% set s = 'a' * 16000000 %}" + "{{ s[::-1]|length }}" * 999, "{% set s = 'a' * 16000000 %}" + "{{ 'b' in s }}" * 999,
    "{% set ns = namespace(s=[1], t=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% set ns.t = [ns.t, ns.t] %}{% endfor %}"
    "{{ ns.s == ns.t }}",
    "{% set ns = namespace(s=(1,)) %}{% for i in range(60) %}{% set ns.s = (ns.s, ns.s) %}{% endfor %}{{ {ns.s: 1} }}",
    "{% set ns = namespace(s=(1,)) %}{% for i in range(60) %}{% set ns.s = cycler(ns.s, ns.s).items %}{% endfor %}{{ {ns.s: 1} }}",
]  # fmt: skip
SPARKS = [
    "{{ messages[0].content }}", "{{ messages[99].role }}", "{{ x.y.z }}", "{{ m.content[::-1] }}", "{{ m.content|upper }}", "{{ m }}",
    "{% if", "%}", "{{", "}}", "{% endfor %}", "{% for m in messages %}", "{% endif %}", "{% else %}", "{% generation %}",
    "{% endgeneration %}", "{% break %}", "{{ raise_exception('no') }}", "{{ raise_exception('a\nb') }}", "{{ ''.__class__.__mro__ }}",
    "{{ self.__init__.__globals__ }}", "{{ 1 / 0 }}", "{{ cycler.__init__.__globals__ }}", "{{ messages.append(1) }}",
    "{{ messages|map('upper')|join }}", "{% include 'x' %}", "{% import 'os' as o %}", "{% extends 'x' %}", "{{ strftime_now('%Y') }}",
    "{{ strftime_now(3) }}", "{{ loop.index }}", "{{ m.content.split('l')[0] }}", "{{ eos_token }}", "{{ tools|tojson }}", "{# ", " #}",
    "{% raw %}", "{% set messages = [] %}", "{{ namespace() }}", "{{ m.content ~ m.content }}", "\x00", "\ud800", "{{ 'a' + 1 }}",
    "{{ [1][5] }}", "{{ {}|first }}", "{{ lipsum() }}", "{% set m = m.content %}", "{{ m.content|replace('e', '') }}", "é",
    "{{ m['role'] }}",
]  # fmt: skip
CHATS = [making.turns("hello", "there"), making.turns("a", " b ", "c\nd", "e", system="s"), making.turns("", "x")]


def templates(folder: Path) -> Case:
    base = {name: Tokenizer.load(making.write_tokenizer(folder / name, name)) for name in making.TEMPLATES}
    mark = re.compile(r"(\{[{%].*?[%}]\})", re.DOTALL)
    pieces = [part for text in making.TEMPLATES.values() for part in mark.split(text) if part]
    rows = making.write_jsonl(folder / "chats.jsonl", [{"messages": messages} for messages in CHATS])

    def case(rng: random.Random, here: Path) -> None:
        name = rng.choice(list(base))
        parts = [part for part in mark.split(making.TEMPLATES[name]) if part]
        for _ in range(rng.randint(1, 3)):
            i = rng.randrange(len(parts) + 1)
            bomb = rng.choice(BOMBS) if rng.random() < 0.5 else "x"
            parts[i : i + rng.randrange(2)] = [rng.choice((rng.choice(SPARKS), rng.choice(SPARKS), rng.choice(pieces), "", bomb))]
        text = "".join(parts)
        if rng.random() < 0.3:
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(NOISE) + text[at + rng.randrange(3) :]
        if rng.random() < 0.2:  # a message's text is changed on its way
            text = re.sub(r"(m\.content|m\['content'\])", rng.choice((r"\1[1:]", r"\1[:-1]", r"(\1|upper)", r"\1[::-1]", "'x'")), text)
        path = here / "t.jinja"
        path.write_bytes(text.encode(errors="surrogatepass"))
        source = SourceConfig(path=str(rows), format="chat")
        cfg = DataConfig(sources=(source,), template=str(path), tokens=1 << 20)
        found = prepare(cfg, cfg.sources, base[name], here / "cache", 0, progress=False)
        if len(found) != len(CHATS):
            raise Wrong(f"{len(found)} documents of {len(CHATS)} records")
        chat = formats.build(cfg, source, base[name])
        for messages in CHATS:
            sample = chat.convert({"messages": messages})
            if len(sample.text) > MAX_OUTPUT:
                raise Wrong(f"{len(sample.text)} characters")
            trained = "".join("".join(sample.text[a:b] for a, b in sample.spans).split())
            for message in messages:
                if message["role"] == "assistant" and "".join(message["content"].split()) not in trained:
                    raise Wrong(f"{message} is not trained in {sample.text[:200]!r}")

    return case


# ---------------------------------------------------------------------------------------------------- tokenizers, adapters

FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
OF_TOKENIZERS = {
    "chat_template": ["x", "", [{"name": "default", "template": "y"}, {"name": "rag", "template": "z"}], {"default": "w"}, [{"name": "a"}]],
    "eos_token": ["<|im_end|>", {"content": "<pad>"}, "new", {"content": 3}, ["a"]],
    "bos_token": ["<s>", None, {"content": "</s>", "lstrip": 3}, "é "],
    "added_tokens_decoder": [{str(i): {"content": c}} for i in ("0", "-1", "480", "x", "1e3") for c in ("<s>", "<new>", "", 3, None)]
    + [{"481": {"content": "<new>", flag: value}} for flag in FLAGS for value in (True, "yes", None)],
    "eos_token_id": [5, [5, 7], None, -1, 1.5, [[2]], ["x"], 2**40],
}  # fmt: skip
OF_PIPELINES = {
    "model": [
        {"type": kind, "vocab": vocab, "merges": [], "unk_id": None, "unk_token": unk}
        for kind in ("BPE", "WordLevel", "Unigram", "X")
        for vocab in ({}, {"a": 0}, {"a": 2**32 - 1}, [["a", 0.5]], [])
        for unk in ("a", "b", None)
    ],
    "pre_tokenizer": [
        None,
        {"type": "FixedLength", "length": 0},
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        {"type": "Whitespace"},
        {"type": "Metaspace", "replacement": "é", "prepend_scheme": "always", "split": True},
    ],
    "normalizer": [
        None,
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Replace", "pattern": {"String": ""}, "content": "xy"},
        {"type": "NFKC"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Lowercase"},
    ],
    "post_processor": [
        None,
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": [], "special_tokens": {}},
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {"type": "BertProcessing", "sep": ["a", 2**32 - 1], "cls": ["b", 3]},
    ],
    "decoder": [
        None,
        {"type": "Strip", "content": "x", "start": 10**9, "stop": 3},
        {"type": "WordPiece", "prefix": "", "cleanup": True},
    ],
    "truncation": [{"max_length": 0, "strategy": "LongestFirst", "stride": 5, "direction": "Right"}],
    "padding": [
        {"strategy": {"Fixed": 2**40}, "direction": "Left", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0, "pad_token": ""}
    ],
    "added_tokens": [[{"id": i, "content": c} | dict.fromkeys(FLAGS, True)] for i in (0, 7, 2**32 - 1) for c in ("", "a", "<s>", " ")],
}
OF_ADAPTERS = {
    "r": [4, 8, 0, 4.0, "4", 10**30, True],
    "lora_alpha": [8, 8.0, 4, 4, 16, 10**400, 0, -8, "8", None, 1e-320, math.inf, math.nan],
    "use_rslora": [True, False, None, 0, "no"],
    "target_modules": [["q_proj"], "all-linear", None, 3, {}, [3], [], "[", ["x" * 5000]],
    "modules_to_save": [None, [], ["lm_head"], "abc", 5, [[]], ["lora_A"], ["self_attn"], ["\ud800"]],
    "use_dora": [True, 1, [0]],
    "bias": ["all", ["none"], None],
    "peft_type": ["LORA", ["LORA"], "lora", None],
    "rank_pattern": [{}, {"q_proj": 2}, 3],
    "lora_dropout": [0, 0.5, 1, "0", None],
    "layers_to_transform": [0, [0], "x"],
    "init_lora_weights": [True, 1, [], {"a": 1}, "pissa"],
}


def damaged_json(rng: random.Random, text: bytes, values: dict[str, list]) -> bytes:
    """A JSON object with another value for some of its keys, now and then one of any kind or one somewhere inside; or other bytes."""
    found = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key = rng.choice(list(values))
        kind = rng.randrange(8)
        if kind < 5:
            found[key] = rng.choice(values[key])
        elif kind == 5:
            found[key] = rng.choice(JUNK)
        elif found:
            key = rng.choice(list(found))
            found[key] = damaged_value(rng, found[key])
    whole = json.dumps(found)
    kind = rng.randrange(12)
    if kind == 0:  # a key twice
        whole = whole[:-1].rstrip() + (", " if found else "") + f'"{key}": {json.dumps(rng.choice(JUNK))}, "{key}": 1}}'
    elif kind == 1:
        whole = rng.choice(("", "null", "[]", "[" * 100_000, whole[: rng.randrange(len(whole))], '{"a": ' + "9" * 5000 + "}"))
    elif kind == 2:
        at = rng.randrange(len(whole) + 1)
        return whole[:at].encode() + rng.choice(PIECES) + whole[at + rng.choice((0, 0, 1, 5)) :].encode()
    return whole.encode()


def misplaced(rng: random.Random, path: Path) -> bool:
    """Puts something else in the place of a file. Does it lead out of the folder, or is no file?"""
    inside, outside = path.with_name("inside"), path.parent.parent / "outside"
    outside.write_bytes(path.read_bytes())
    kind = rng.randrange(6)
    path.rename(inside)
    if kind == 0:
        path.symlink_to("inside")
        return False
    if kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.mkdir()
    else:
        path.symlink_to(rng.choice((outside, "../outside", "/dev/zero", "/proc/self/environ", "/dev/stdin", "nothing", path.name)))
    return True


def tokenizers(folder: Path) -> Case:
    files = {}
    for kind, bos in (("bytes", False), ("bytes", True), ("pieces", False), ("pieces", True)):
        made = making.write_tokenizer(folder / f"{kind}{bos}", "chatml", kind, bos, stop=("<|im_end|>",))
        (made / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
        files[kind, bos] = {path.name: path.read_bytes() for path in sorted(made.iterdir())}
    texts = ["Hello there, how are you?", "", " ", "Grüße 東京 😀\n\n x", "<s>a</s><|im_end|>b"]
    nowhere = os.open(os.devnull, os.O_WRONLY)

    def case(rng: random.Random, here: Path) -> None:
        os.dup2(nowhere, 2)  # where the library tells its panics, besides raising them
        good = rng.choice(list(files.values()))
        for name, content in good.items():
            (here / name).write_bytes(content)
        changed, away = here / rng.choice(list(good)), False
        if rng.random() < 0.1:
            away = misplaced(rng, changed)
        else:
            values = OF_PIPELINES if changed.name == "tokenizer.json" else OF_TOKENIZERS
            changed.write_bytes(damaged_json(rng, changed.read_bytes(), values))
        tokenizer = Tokenizer.load(here)
        if away:
            raise Wrong(f"{changed.name} is not the folder's")
        tokenizer.check_vocabulary(1 << 20)
        got = [tokenizer.encode(text) for text in texts]
        if got != [encoding.ids for encoding in tokenizer.encode_batch(texts)]:
            raise Wrong("a batch is not its texts")
        for ids in got:
            tokenizer.decode(ids)
        config, generation = (json.loads((here / name).read_bytes()) for name in ("tokenizer_config.json", "generation_config.json"))
        given = config.get("chat_template") or {}
        named = {item["name"]: item["template"] for item in given} if isinstance(given, list) else given
        if tokenizer.templates != ({"default": named} if isinstance(named, str) else named):
            raise Wrong(f"{tokenizer.templates} instead of {given!r}")
        stop = generation.get("eos_token_id")
        ends = [] if stop is None else stop if isinstance(stop, list) else [stop]
        eos = config.get("eos_token")
        first = None if eos is None else tokenizer.encode(eos if isinstance(eos, str) else eos["content"])
        if not {*ends} <= {*tokenizer.eos_ids} or (first and [tokenizer.eos_id] != first) or len({*tokenizer.eos_ids} - {*ends}) > 1:
            raise Wrong(f"{tokenizer.eos_ids} instead of {eos!r} and {stop!r}")
        if changed.name == "tokenizer.json":
            alone = Pipeline.from_file(str(changed))
            alone.no_truncation()
            alone.no_padding()
            known = {token.content for token in alone.get_added_tokens_decoder().values()}
            if {"<s>", "</s>", "<pad>"} <= known and got != [alone.encode(text, add_special_tokens=False).ids for text in texts]:
                raise Wrong("the library alone makes other tokens")

    return case


def adapters(folder: Path) -> Case:
    lora = LoraConfig(rank=4, alpha=8)
    write_model(folder / "model", num_hidden_layers=1)
    net = prepared(folder / "model", lora)
    materialize(net, "cpu", 0, folder / "model")
    train_a_little(net)
    export_adapter(net, folder / "adapter", lora, "org/base")
    config, weights = ((folder / "adapter" / name).read_bytes() for name in (CONFIG, f"{STEM}.safetensors"))
    parameters, names = {n: p for n, p in net.named_parameters() if is_adapter(n)}, NameMap.of(net)

    def case(rng: random.Random, here: Path) -> None:
        (here / CONFIG).write_bytes(config)
        (here / f"{STEM}.safetensors").write_bytes(weights)
        os.mkfifo(here / f"{STEM}-x.safetensors")  # which nothing names
        away, kind = False, rng.randrange(10)
        if kind == 0:
            away = misplaced(rng, here / rng.choice((CONFIG, f"{STEM}.safetensors")))
        elif kind < 4:
            (here / f"{STEM}.safetensors").write_bytes(damaged_weights(rng, weights))
        else:
            (here / CONFIG).write_bytes(damaged_json(rng, config, OF_ADAPTERS))
        for p in parameters.values():
            p.data.fill_(math.nan)
        fingerprint(here, True, STEM, CONFIG)
        load_adapter(net, here)
        if away:
            raise Wrong("what was loaded is not the folder's")
        asks = json.loads((here / CONFIG).read_bytes())
        rank, alpha = asks["r"], asks["lora_alpha"]
        scale = alpha / (math.sqrt(rank) if asks.get("use_rslora") else rank)
        odd = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication") if asks.get(key)]
        if (rank, scale, asks["peft_type"], asks.get("bias") or "none", odd) != (4, 2.0, "LORA", "none", []):
            raise Wrong(f"{asks} is not what this model computes")
        there = said(here, STEM)
        for name, p in parameters.items():
            if not torch.equal(p.data, there[PREFIX + names.to_hf(name)].reshape(p.shape)):
                raise Wrong(f"{name} is not what the file holds")

    return case


# ------------------------------------------------------------------------------------------------------------- checkpoints

SHAPES = {
    "model.a.weight": ((7, 6), torch.float32),
    "optim.a.weight.exp_avg": ((7, 6), torch.float32),
    "model.norm.weight": ((3,), torch.bfloat16),
    "model.experts": ((4, 3, 2), torch.float16),
    "optim.packed": ((5, 4), torch.uint8),
    "optim.rows": ((2,), torch.int64),
    "optim.count": ((), torch.float32),
}
FRESH = {"step": 0, "tokens": 0, "packs_per_step": 4, "evaluate": False}
FRESH |= {"early": {"best": None, "bad": 0}, "guard": {"in_a_row": 0, "total": 0}}
FRESH |= {"meters": {"loss": 0.0, "units": 0, "tokens": 0, "seconds": 0.0}}
THE_RUN = {"model": "aa", "data": "bb", "optimizer": {"kind": "cc"}}
SETTINGS = {"optim.lr": 0.1, "log.every": 1, "model.path": "m", "train.accumulate": 2, "data.sources": [{"path": "x"}]}
COUNTS = [0, 1, 2, -1, 2.0, 1e300, -0.0, True, None, "2", math.nan, math.inf, 1 << 53, (1 << 53) + 1, 1 << 63, 10**400, [], {}]
OF_STATES = dict.fromkeys(("step", "tokens", "packs_per_step", "evaluate", "x", "\x1b[31m"), COUNTS) | {
    "early": [{"best": n} for n in COUNTS] + [{"bad": n} for n in COUNTS] + [None, [], {"worst": 1}],
    "guard": [{"total": n} for n in COUNTS] + [{}, {"in_a_row": {"a": 1}}],
    "meters": [{name: n} for name in ("loss", "units", "tokens", "seconds") for n in COUNTS],
}
OF_MANIFESTS = {
    "format": [1, 1.0, True, 2, "1", None, [[]]],
    "step": COUNTS,
    "written": ["now", "", "\x1b[31m", "x" * 99, None, 3],
    "origin": [None, {}, {"path": "/etc", "step": 1, "id": "x"}, {"path": "\x1b", "step": -1, "id": 3}, [], {"path": ["x"]}],
    "healthy": [True, False, None, 0, "yes", []],
    "eval_loss": [0.5, -0.0, 1, True, None, "0.5", math.nan, math.inf, [0.5], {}],
    "layout": [{"world": 1}, {"world": 2}, {"world": 1.0}, {"world": True}, {"world": 0}, {}, {"world": 1, "shard": [1]}, None],
    "versions": [{}, None, {"torch": "\x1b[31m"}, 3],
    "identity": [THE_RUN, {}, {"model": "aa"}, {"\x1b\n": 1}, {"a": [[[]]]}, THE_RUN | {"data": "cc"}, {"model": {"": {"": 1}}}, None],
    "config": [SETTINGS | {key: value} for key in (*SETTINGS, "x", "\x1b\n") for value in (0.1, 2, "\x1b[31m", [[]], {}, math.nan)] + [[]],
    "files": [{}, None, []],
    "id": [3, {"a": 1}],
    "crc32": [None, 3, "00000000"],
}
OF_RECORDS = {"size": COUNTS, "crc32": ["00000000", "0", None, 3, "\x1b", "FFFFFFFF"]}
MORE_FILES = ["../x", "/etc/passwd", "", ".", "..", "a/b", "a\\b", "x\0", "\x1b[31m", "x" * 300, resealed.MANIFEST, "absent", "pipe"]


def as_integers(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {name: t.view(views[t.element_size()]).numpy().view(f"<u{t.element_size()}") for name, t in tensors.items()}


def once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    assert len(found) == len(pairs), "a key is there twice"
    return found


def changed_manifest(rng: random.Random, path: Path) -> None:
    manifest = json.loads((path / resealed.MANIFEST).read_bytes())
    del manifest["crc32"]
    kind = rng.randrange(8)
    if kind == 0:
        files = manifest["files"]
        name = rng.choice(list(files))
        how = rng.randrange(4)
        if how == 0:
            del files[name]
        elif how == 1:
            more = rng.choice(MORE_FILES)
            files[more] = files[name]
            if more == "pipe":
                os.mkfifo(path / more)
        elif how == 2:
            files[name] = files[name] | {(key := rng.choice(list(OF_RECORDS))): rng.choice(OF_RECORDS[key])}
        else:
            files[name] = rng.choice(JUNK)
    elif kind == 1:
        del manifest[rng.choice(list(manifest))]
    elif kind == 2:  # keys of another depth
        deep: object = 1
        for _ in range(rng.choice((5, 23, 24, 30, 900))):
            deep = {"a": deep} if rng.random() < 0.5 else [deep]
        manifest[rng.choice(list(manifest))] = deep
    body = json.dumps(manifest).encode()
    if kind > 2:
        body = damaged_json(rng, body, OF_MANIFESTS)
    resealed.seal(path, body)
    if rng.random() < 0.05:
        whole = (path / resealed.MANIFEST).read_bytes()
        at = rng.randrange(30)
        (path / resealed.MANIFEST).write_bytes(whole[:at] + rng.choice(PIECES) + whole[at:])


def hostile(rng: random.Random, path: Path, marker: Path) -> Path:
    """Changes one thing of a checkpoint, and seals it again. Returns where it lies afterwards."""
    kind = rng.randrange(20)
    files = sorted(file.name for file in path.iterdir())
    if kind < 7:
        resealed.damage_metadata(rng, path, marker)
    elif kind < 12:
        resealed.damage_tensors(rng, path, marker)
    elif kind == 12:
        name = rng.choice([name for name in files if name.startswith("rng_")])
        how = rng.randrange(6)
        if how == 0:
            manifest = json.loads((path / resealed.MANIFEST).read_bytes())
            del manifest["files"][name]
            (path / name).unlink()
            resealed.seal(path, manifest)
        elif how == 1:
            with open(path / name, "r+b") as file:
                file.truncate(17 << 20)
        elif how == 2:
            (path / name).write_bytes(resealed.saved(resealed.junk(rng, marker)) if rng.random() < 0.5 else b"")
        else:
            (path / name).write_bytes(damaged_weights(rng, (path / name).read_bytes()))
    elif kind < 15:
        data = damaged_json(rng, (path / "state.json").read_bytes(), OF_STATES)
        (path / "state.json").write_bytes(data + b" " * (1 << 20) if rng.random() < 0.05 else data)
    elif kind == 15:
        misplaced(rng, path / rng.choice(files))
    elif kind == 16:  # of another step, and of one mind about it or not
        n, rest = rng.choice(((3, 0), (3, 1), (3, 2), (0, 2), (1 << 63, 2), (1 << 62, 2), (10**200, 2))), path
        step, depth = n
        path = path.with_name(f"step_{step}")
        rest.rename(path)
        if depth:
            manifest = json.loads((path / resealed.MANIFEST).read_bytes()) | {"step": step}
            resealed.seal(path, manifest)
        if depth == 2:
            (path / "state.json").write_text(json.dumps(json.loads((path / "state.json").read_text()) | {"step": step}))
    elif kind == 17 and rng.random() < 0.3:
        (path / "resolved.toml").write_bytes(rng.choice(PIECES) * rng.randrange(3))
    else:
        changed_manifest(rng, path)
        return path
    if (path / resealed.MANIFEST).is_file() and not (path / resealed.MANIFEST).is_symlink():
        resealed.reseal(path)
    return path


def beside(rng: random.Random, run: Path, marker: Path) -> None:
    """What else may lie in a run's folder: links, pipes and folders in the place of its own files."""
    place = run / "checkpoints"
    outside = run.parent / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    name = rng.choice(
        (".lock", "latest", "superseded_1", "step_2.pin", ".tmp-3-x", ".trash-x", "step_9", "step_99999999999999999999", "step_x")
    )
    (place / name).unlink(missing_ok=True)
    kind = rng.randrange(4)
    if kind == 0:
        os.mkfifo(place / name)
    elif kind == 1:
        (place / name).mkdir()
    else:
        (place / name).symlink_to(rng.choice((marker, outside, outside / "kept", "step_1", name)))


def state_said(path: Path, step: int) -> dict:
    """What a run is to begin with: an independent account of `Found.state_like`."""

    def over(fresh: dict, given: dict, within: str) -> dict:
        for key, value in given.items():
            like = fresh[key]
            if isinstance(like, dict):
                assert type(value) is dict
                value = over(like, value, key)
            elif type(like) is bool:
                assert type(value) is bool
            elif type(like) is int:
                assert type(value) is int and (1 <= value <= 10**6 if key == "packs_per_step" else 0 <= value <= 1 << 53)
            elif (within, key) in (("early", "best"), ("meters", "loss")):
                assert type(value) is float or (type(value) is int and abs(value) <= 1 << 53) or (value is None and key == "best")
            else:
                assert (within, key) == ("meters", "seconds") and type(value) in (int, float) and abs(value) < math.inf
                assert value >= 0 or type(value) is int
            fresh = fresh | {key: value}
        return fresh

    found = over(FRESH, json.loads((path / "state.json").read_bytes().decode(), object_pairs_hook=once), "")
    assert found["step"] == step
    return found


def sealed_as_said(path: Path, step: int, begun: bool) -> dict:
    """The manifest, which is of this folder and these files."""
    whole = (path / resealed.MANIFEST).read_bytes()
    first, _, body = whole.partition(b"\n")
    manifest = json.loads(whole, object_pairs_hook=once)
    assert first == f'{{"crc32": "{zlib.crc32(body):08x}",'.encode() and manifest["format"] == 1
    assert step == manifest["step"] and (begun or path.name == f"step_{step}")
    for name, entry in manifest["files"].items():
        file = path / name
        assert file.parent == path and file.is_file() and not file.is_symlink(), f"{name} is no file of this folder"
        assert resealed.record(file) == {key: entry[key] for key in ("size", "crc32")}, f"{name} was changed"
    loss = manifest.get("eval_loss")
    assert loss is None or (type(loss) is float and abs(loss) < math.inf)
    assert manifest["identity"] == THE_RUN, "the checkpoint is of another run"
    kept = {key: manifest["config"][key] for key in SETTINGS if not key.startswith(("log", "model.path"))}
    assert kept == {key: SETTINGS[key] for key in kept}, "the checkpoint has other settings"
    return manifest


def checkpoints(folder: Path) -> Case:
    shutil.rmtree(folder / "case", ignore_errors=True)

    def tensors(step: int) -> dict[str, torch.Tensor]:
        dice = torch.Generator().manual_seed(step)
        return {name: (torch.rand(shape, generator=dice) * 200).to(dtype) for name, (shape, dtype) in SHAPES.items()}

    def checkpointer(run: Path, said: list[str]) -> Checkpointer:
        return Checkpointer(run, CheckpointConfig(), THE_RUN, "x = 1\n", SETTINGS, rules=DRIFT, say=said.append)

    def make(rank: int, world: int) -> None:
        ckpt = checkpointer(folder / f"good{world}", [])
        for step in (1, 2):
            torch.manual_seed(step)
            state = FRESH | {"step": step, "tokens": 100 * step, "meters": {"loss": 0.5, "units": 3, "tokens": 9, "seconds": 0.25}}
            ckpt.save(step, spread(tensors(step), "one" if world == 1 else "fsdp2"), state, {"cpu": torch.get_rng_state()})

    originals = {step: as_integers(tensors(step)) for step in (1, 2)}
    for world in (1, 2):
        on_ranks(make, world)
        for step, wanted in originals.items():  # so the other reader reads what is there
            got = resealed.said(folder / f"good{world}/checkpoints/step_{step}")
            assert got.keys() == wanted.keys() and all(np.array_equal(got[name], wanted[name]) for name in wanted)
    marker, into, local = folder / "ran", {}, {}

    def load(run: Path, policy: str, said: list[str]) -> tuple:
        """As train.py does."""
        ckpt = checkpointer(run, said)
        try:
            found = ckpt.find(policy)
            if found is None:
                raise Wrong("a run begins anew where there are checkpoints")
            state = found.state_like(FRESH)
            for t in local.values():
                t.fill_(math.nan if t.is_floating_point() else 99)
            ckpt.load(found, into)
            states = ckpt.rng(found)
            restore_random(states, found.path)
        finally:
            ckpt.store.release()
            dist.destroy_process_group(ckpt.team.group)
        return found, state, states

    def case(rng: random.Random, here: Path) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            into.update(spread(tensors(0), "one"))
            local.update({name: t.to_local() if isinstance(t, DTensor) else t for name, t in into.items()})  # the same memory
        run, said = here / "run", []
        shutil.copytree(folder / f"good{rng.choice((1, 1, 2))}", run)
        changed = run / "checkpoints/step_2"
        if rng.random() < 0.5:
            shutil.rmtree(run / "checkpoints/step_1")
        changed = hostile(rng, changed, marker)
        begun = rng.random() < 0.3
        if rng.random() < 0.1:
            beside(rng, run, marker)
        try:
            found, state, states = load(run if not begun or rng.random() < 0.5 else here / "other", str(changed) if begun else "auto", said)
        finally:
            if marker.exists():
                marker.unlink()
                raise Wrong("code of the file ran, or a file outside was made")
            if (here / "outside").exists() and [p.name for p in (here / "outside").iterdir()] != ["kept"]:
                raise Wrong("something outside of the run's folder was changed")
        try:
            manifest = sealed_as_said(found.path, found.step, begun)
            there = resealed.said(found.path)
            assert there.keys() == into.keys(), "other names"
            got = as_integers(local)
            for name in into:
                assert np.array_equal(got[name], there[name]), f"{name} is not what the files hold"
            wanted = state_said(found.path, found.step)
            assert repr(state) == repr(wanted), f"{state} instead of {wanted}"
            assert (states is None) == (manifest["layout"] != {"world": 1})
            if states is not None:
                assert_random(states, found.path / "rng_0.safetensors")
        except Exception as error:
            raise Wrong(f"{found.path.name} of {said}: {type(error).__name__}: {error}") from error
        if found.path.name != changed.name and found.step < int(changed.name.removeprefix("step_")):
            (reason,) = [text for text in said if text.startswith(f"skipped {changed.resolve()}: ")]
            raise ModelError(reason)  # a refusal, and what was loaded instead is right

    return case


def assert_random(states: dict[str, torch.Tensor], path: Path) -> None:
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    assert {*states} == {*header} - {"__metadata__"}
    begin, end = header["cpu"]["data_offsets"]
    assert states["cpu"].numpy().tobytes() == torch.get_rng_state().numpy().tobytes() == whole[8 + size + begin : 8 + size + end]


# ---------------------------------------------------------------------------------------------------------------- campaign

KINDS: dict[str, Callable[[Path], Case]] = {
    "configs": configs,
    "data": data,
    "safetensors": safetensors,
    "templates": templates,
    "tokenizers": tokenizers,
    "adapters": adapters,
    "checkpoints": checkpoints,
}
BAD = ("tracebacks", "wrong_loads", "hangs", "crashes")
# the case, when it began by the clock and by processor time; the longest that one took and which; loaded, refused, tracebacks, wrong
_STATE = struct.Struct("@qdddqqqqq")


def campaign(kind: str, count: int, seed: int = 0, first: int = 0, log: Callable[[str], None] = print) -> dict[str, object]:
    """Runs `count` cases of a kind; returns the counts. What went wrong is said, with the number of its case."""
    state, begun = mmap.mmap(-1, _STATE.size), time.monotonic()
    counts = dict.fromkeys(("loaded", "refused", *BAD), 0)
    peak, slowest = 0.0, (0.0, first)
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        case = KINDS[kind](Path(folder))
        number, last = first, first + count
        while number < last:
            _STATE.pack_into(state, 0, number, time.monotonic(), 0.0, 0.0, number, 0, 0, 0, 0)
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                _child(kind, case, number, last, seed, Path(folder), state, log)
            status, usage, looks = None, None, 0
            while status is None:
                time.sleep(0.02)
                seen, (number, since, worked, *_) = number, _STATE.unpack_from(state)
                late = _processor_s(pid) - worked > LIMIT_S or time.monotonic() - since > ASLEEP_S
                looks = looks + 1 if late and seen == number else 0  # twice, as one look may fall between the writes of two cases
                if looks == 2:
                    os.kill(pid, signal.SIGKILL)
                done, code, usage = os.wait4(pid, 0 if looks == 2 else os.WNOHANG)
                if done:
                    status = os.waitstatus_to_exitcode(code)
            number, _, _, *longest, loaded, refused, broken, wrong = _STATE.unpack_from(state)
            slowest = max(slowest, tuple(longest))
            for name, n in zip(("loaded", "refused", "tracebacks", "wrong_loads"), (loaded, refused, broken, wrong)):
                counts[name] += n
            peak = max(peak, usage.ru_maxrss / 1024)
            if number < last:  # it did not come to its end
                counts["hangs" if looks == 2 else "crashes"] += 1
                slowest = max(slowest, (LIMIT_S if looks == 2 else 0.0, number))
                what = f"works for more than {LIMIT_S:g} s" if looks == 2 else f"the process ended with {status}"
                log(f"{kind} {number}: {what}")
                number += 1
    spent = {"slowest_s": round(slowest[0], 2), "slowest_case": slowest[1], "seconds": round(time.monotonic() - begun, 1)}
    return {"cases": count, **counts, "peak_mib": round(peak), **spent}


def _processor_s(pid: int) -> float:
    """What a child has used of processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _child(kind: str, case: Case, number: int, last: int, seed: int, folder: Path, state: mmap.mmap, log: Callable[[str], None]) -> None:
    """Runs cases from `number` on; never returns."""
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + (TEMPLATES_MEMORY if kind == "templates" else MEMORY)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    loaded = refused = broken = wrong = 0
    here, slowest = folder / "case", (0.0, number)
    for number in range(number, last):  # noqa: B020
        worked = time.process_time()
        _STATE.pack_into(state, 0, number, time.monotonic(), worked, *slowest, loaded, refused, broken, wrong)
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        try:
            case(random.Random(f"{seed} {kind} {number}"), here)
            loaded += 1
        except UserError as error:
            refused += 1
            if "MemoryError" in str(error):
                broken += 1
                log(f"{kind} {number}: nothing but this test's limit bounded the memory: {error}")
            if not str(error).isprintable() or not str(error) or len(str(error)) > 2100:
                broken += 1
                log(f"{kind} {number}: not one line: {str(error)[:300]!r}")
        except Wrong as error:
            wrong += 1
            log(f"{kind} {number}: wrong load: {error}")
        except BaseException:
            broken += 1
            log(f"{kind} {number}: {traceback.format_exc()}")
        slowest = max(slowest, (time.process_time() - worked, number))
    _STATE.pack_into(state, 0, last, time.monotonic(), time.process_time(), *slowest, loaded, refused, broken, wrong)
    sys.stdout.flush()
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Damaged and hostile inputs; see the module.")
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, help=f"how many cases of {kind}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--out", type=Path, help="a JSON file for the counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted, bad = {kind: getattr(args, kind) for kind in KINDS if getattr(args, kind)}, 0
    for kind, count in wanted.items():
        about = {"command": f"python -m tests.fuzz --{kind} {count}", "seed": args.seed, "first": args.first, **made()}
        counts = campaign(kind, count, args.seed, args.first)
        print(f"{kind}: {counts}")
        bad += sum(counts[name] for name in BAD)
        if args.out:
            found = json.loads(args.out.read_text()) if args.out.exists() else {"kinds": {}}
            memory = (TEMPLATES_MEMORY if kind == "templates" else MEMORY) >> 20
            found["kinds"][kind] = about | {"limit_s": LIMIT_S, "memory_mib": memory, **counts}
            args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if bad else 0


def made() -> dict[str, str]:
    """When, of which commit and with which versions a result is made."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    about = {"date": date.today().isoformat(), "commit": commit()}
    return about | {"machine": f"{os.cpu_count()} CPU cores"} | versions


if __name__ == "__main__":
    sys.exit(main())
