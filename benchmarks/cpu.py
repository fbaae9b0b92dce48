"""What the README claims about speed and memory, measured on the CPU of this machine.

    python -m benchmarks.cpu [--quick] [--only NAME ...] [--out FILE.json]

Every cell runs in processes of its own. What is compared alternates, A B A B, so that both sides see the same load of the
machine, and what is reported are ratios of medians; CPU seconds stand beside wall seconds. Each cell prints one JSON line,
the end is a table with the goals. `--quick` makes everything tiny: it shows that the benchmarks work, its numbers mean nothing.

    lora_ragged    real tokens/s and peak memory of a LoRA step beside the HF Trainer + PEFT: padded there, packed here
    lora_unpadded  the same with documents of equal length, where nobody pads
    packing        a million log-normal documents into rows
    pipeline_*     from a .jsonl file to the tokenized cache, beside the bare `encode_batch` over the same texts
    memory         bytes a document that the data side holds, from two sizes of a data set
    help           `python train.py --help`
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy")


@dataclass(frozen=True)
class Goal:
    """`cell`'s number `key` should be at least, or at most, `bound`."""

    cell: str
    key: str
    sign: str
    bound: float

    def met(self, value: float) -> bool:
        return value >= self.bound if self.sign == ">=" else value <= self.bound


GOALS = (
    Goal("lora_ragged", "speed_ratio", ">=", 1.3),
    Goal("lora_ragged", "memory_ratio", "<=", 0.8),
    Goal("lora_unpadded", "speed_ratio", ">=", 1.0),
    Goal("lora_unpadded", "memory_ratio", "<=", 0.8),
    Goal("packing", "seconds", "<=", 1.0),
    Goal("packing", "fill", ">=", 0.995),
    Goal("pipeline_completion", "speed_ratio", ">=", 0.85),
    Goal("pipeline_chat", "speed_ratio", ">=", 0.85),
    Goal("memory", "held_bytes_per_document", "<=", 16.5),
    Goal("help", "seconds", "<=", 1.0),
)


# ---------------------------------------------------------------------------------------------------------- training


def log_normal(n: int, mean: float, sigma: float, longest: int, seed: int = 0):
    """int64 [n]: lengths of documents as corpora have them, of this mean before those above `longest` are cut."""
    import numpy as np

    draws = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, n)
    return np.clip(np.rint(draws).astype(np.int64), 4, longest)


def lora(quick: bool, ragged: bool) -> dict:
    """Ours and theirs over one epoch of the same documents, step by step in turns; the first step of each is warm-up.

    A row of ours has as many slots as a batch of theirs has real tokens on average.
    """
    hidden, layers, vocab, rows, batches, mean = (32, 2, 320, 4, 3, 24) if quick else (512, 8, 16384, 10, 16, 200)
    longest = mean * 64 // 25
    shape = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 16 if quick else hidden // 64,
        "num_key_value_heads": 1 if quick else hidden // 128,
        "max_position_embeddings": 2 * longest,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
    }
    lengths = log_normal(rows * batches, mean, 0.6, longest) if ragged else [mean] * (rows * batches)
    tokens = max(longest, int(sum(lengths) / batches)) if ragged else rows * mean
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        rng = random.Random(0)
        with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
            for n in lengths:
                print(json.dumps({"input_ids": rng.choices(range(3, vocab), k=int(n))}), file=file)
        (folder / "config.toml").write_text(
            f'[model]\npath = "{folder}/model"\n[output]\npath = "{folder}/run"\n'
            f'[data]\ntokens = {tokens}\nmax_length = {longest}\ncache = "{folder}/cache"\n'
            f'[[data.sources]]\npath = "{folder}/data.jsonl"\nformat = "tokenized"\n'
            f'[train]\nepochs = 1\n[lora]\nrank = 16\nalpha = 32\nadapter = "{folder}/adapter"\n'
            f'[optim]\nlr = 0.0\n[schedule]\nkind = "constant"\n[recompute]\nkind = "full"\n[precision]\ncompute = "fp32"\n'
            f'[log]\nevery = 1\n[run]\ndevice = "cpu"\n'
        )
        job = {"shape": shape, "rank": 16, "recompute": True, "rows": rows, "tokens": tokens}
        job |= {key: str(folder / key) for key in ("model", "adapter", "out")}
        job |= {"config": str(folder / "config.toml"), "data": str(folder / "data.jsonl")}
        (folder / "job.json").write_text(json.dumps(job))
        write_tokenizer(folder / "model", [" ".join(WORDS)], 260)
        _trainer("make", folder, folder).communicate()
        sides = {"ours": _trainer("ours", folder, ROOT), "theirs": _trainer("theirs", folder, folder)}
        steps = _in_turns(sides, folder)

    units = [sum(s["units"] for s in steps[side]) for side in sides]
    losses = [sum(s["units"] * s["loss"] for s in steps[side]) / units[0] for side in sides]
    assert units[0] == units[1], f"the sides trained {units} tokens"
    assert losses[0] > 1 and abs(losses[0] / losses[1] - 1) < 1e-5, f"the sides have losses {losses}: they did not train the same thing"
    found = {"parameters_m": round((_size(shape)) / 1e6, 1), "documents": len(lengths), "real_tokens": int(sum(lengths)), "losses": losses}
    for side, timed in ((side, steps[side][1:]) for side in sides):
        found[side] = {
            "steps": len(timed),
            "tokens_per_s": statistics.median(s["tokens"] / s["seconds"] for s in timed),
            "tokens_per_cpu_s": statistics.median(s["tokens"] / s["cpu_seconds"] for s in timed),
            "tokens_per_s_overall": sum(s["tokens"] for s in timed) / sum(s["seconds"] for s in timed),
            "real_share_of_slots": sum(s["tokens"] for s in steps[side]) / sum(s["slots"] for s in steps[side]),
            "peak_mib": timed[-1]["peak_bytes"] / 2**20,
            "start_mib": timed[-1]["start_bytes"] / 2**20,
        }
    a, b = found["ours"], found["theirs"]
    found |= {"speed_ratio": a["tokens_per_s"] / b["tokens_per_s"], "memory_ratio": a["peak_mib"] / b["peak_mib"]}
    found |= {"cpu_speed_ratio": a["tokens_per_cpu_s"] / b["tokens_per_cpu_s"]}
    found |= {"overall_speed_ratio": a["tokens_per_s_overall"] / b["tokens_per_s_overall"]}
    return found | {"memory_ratio_above_start": (a["peak_mib"] - a["start_mib"]) / (b["peak_mib"] - b["start_mib"])}


def _size(shape: dict) -> int:
    d, f, kv = shape["hidden_size"], shape["intermediate_size"], shape["num_key_value_heads"] / shape["num_attention_heads"]
    return int(shape["num_hidden_layers"] * (d * d * (2 + 2 * kv) + 3 * d * f) + 2 * d * shape["vocab_size"])


def _trainer(role: str, folder: Path, cwd: Path) -> subprocess.Popen:
    """Starts a role of trainers.py on one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", str(ROOT / "benchmarks" / "trainers.py"), role, str(folder / "job.json")]
    with open(folder / f"{role}.log", "w") as log:
        return subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)


def _in_turns(sides: dict[str, subprocess.Popen], folder: Path) -> dict[str, list[dict]]:
    """What each side said after each of its steps; one side works at a time."""
    steps: dict[str, list[dict]] = {side: [] for side in sides}
    for side, process in sides.items():  # to the end of the warm-up, one after the other
        steps[side].append(json.loads(process.stdout.readline() or "null"))
    while any(process.poll() is None for process in sides.values()):
        for side, process in sides.items():
            if process.poll() is None:
                process.stdin.write("go\n")
                process.stdin.flush()
                if line := process.stdout.readline():
                    steps[side].append(json.loads(line))
                else:
                    process.wait()
    for side, process in sides.items():
        assert process.returncode == 0, f"{side} failed:\n{(folder / f'{side}.log').read_text()[-3000:]}"
    return steps


# -------------------------------------------------------------------------------------------------------------- data


WORDS = tuple("".join(random.Random(i).choices("etaoinshrdlucmfwypvbgk", k=1 + i % 9)) for i in range(20000))
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)


def texts(n: int, words: int, seed: int = 0) -> list[str]:
    """Words by Zipf's law, of log-normal number: as many different ones as language has, with its frequencies."""
    from itertools import accumulate

    rng = random.Random(seed)
    weights = list(accumulate(1 / (i + 1) for i in range(len(WORDS))))
    return [" ".join(rng.choices(WORDS, cum_weights=weights, k=int(k))) + "." for k in log_normal(n, words, 0.8, 20 * words, seed)]


def write_tokenizer(folder: Path, corpus: list[str], vocab: int) -> None:
    """A byte-level BPE tokenizer as llama and qwen have, with ChatML tokens and a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tok = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def packing(quick: bool) -> dict:
    """The plan of an epoch: which document goes where, of lengths alone. All of it, as data/stream.py makes it."""
    import numpy as np

    from data import packing

    n, tokens = (20_000 if quick else 1_000_000), 8192
    lengths = log_normal(n, 400, 1.0, tokens)

    def plan() -> tuple[float, int]:
        packs = packing.pack(np.sort(lengths)[::-1], tokens)
        most = packing.max_documents(packs)
        _, bounds = packing.arrange(lengths, packing.limit(packs, most), 0, 0, True)
        return float(lengths.sum() / ((len(bounds) - 1) * tokens)), most

    def pack() -> np.ndarray:
        return packing.pack(np.sort(lengths)[::-1], tokens)

    (alone, cpu), (whole, whole_cpu) = in_turns([pack, plan], 2 if quick else 5)
    fill, most = plan()
    facts = {"documents": n, "mean_length": float(lengths.mean()), "row": tokens, "fill": fill, "documents_in_a_row": most}
    return facts | {"seconds": alone, "cpu_seconds": cpu, "seconds_with_shuffle": whole, "cpu_seconds_with_shuffle": whole_cpu}


def in_turns(sides: list[Callable[[], object]], times: int) -> list[tuple[float, float]]:
    """Median (wall, CPU) seconds of each function, called in turns after one call as warm-up."""
    took: list[list[tuple[float, float]]] = [[] for _ in sides]
    for i in range(times + 1):
        for side, kept in zip(sides, took):
            wall, cpu = time.perf_counter(), time.process_time()
            side()
            if i:
                kept.append((time.perf_counter() - wall, time.process_time() - cpu))
    return [tuple(map(statistics.median, zip(*kept))) for kept in took]


def pipeline(quick: bool, form: str) -> dict:
    """From the file to a synced, checksummed cache, beside `encode_batch` of the same texts, which only makes encodings."""
    from tokenizers import Tokenizer as Pipeline

    from data import formats
    from data.config import DataConfig, SourceConfig
    from data.prepare import prepare
    from data.tokenizer import Tokenizer

    n = 500 if quick else 20_000
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        found = texts(2 * n, 80)
        write_tokenizer(folder, found[: n // 4], 1000 if quick else 8192)
        records = [{"text": f"{a} {b}"} for a, b in zip(found[::2], found[1::2])]
        if form == "chat":
            turns = zip(found[::2], found[1::2])
            records = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in turns]
        (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        source = SourceConfig(str(folder / "data.jsonl"), form)
        cfg = DataConfig((source,))
        tokenizer, bare = Tokenizer.load(folder), Pipeline.from_file(str(folder / "tokenizer.json"))
        convert = formats.build(cfg, source, tokenizer).convert
        plain = [convert(record).text for record in records]
        made = []

        def ours() -> None:
            made.append(prepare(cfg, (source,), tokenizer, folder / f"cache{len(made)}", 0, progress=False))

        def raw() -> None:
            for i in range(0, len(plain), 1000):
                bare.encode_batch(plain[i : i + 1000], add_special_tokens=False)

        (a, a_cpu), (b, b_cpu) = in_turns([ours, raw], 2 if quick else 5)
        tokens = int(made[0].lengths.sum())
    rates = {"tokens": tokens, "documents": n, "ours_tokens_per_s": tokens / a, "raw_tokens_per_s": tokens / b}
    return rates | {"ours_cpu_seconds": a_cpu, "raw_cpu_seconds": b_cpu, "speed_ratio": b / a, "cpu_speed_ratio": b_cpu / a_cpu}


def memory(quick: bool) -> dict:
    """Bytes a document, as the difference between two sizes of a data set, each in a process of its own.

    held: what the documents and the plan of an epoch leave allocated, all that a run goes on with; peaks: the most resident at
    any moment until there are documents, and until there is a plan, pages of the files that are memory-mapped included.
    """
    small, large = (2_000, 10_000) if quick else (100_000, 500_000)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        found = texts(2_000, 8)
        write_tokenizer(folder, found, 1000)
        sizes = {}
        for n in (small, large):
            (folder / f"{n}.jsonl").write_text("".join(json.dumps({"text": f"{i} {found[i % len(found)]}"}) + "\n" for i in range(n)))
            for state in ("tokenizing", "cached"):
                sizes[state, n] = _cell("memory_of", str(folder), str(n))
    slope = {
        (state, key): (sizes[state, large][key] - sizes[state, small][key]) / (large - small)
        for state in ("tokenizing", "cached")
        for key in ("held", "peak_tokens", "peak")
    }
    return {
        "documents": [small, large],
        "mib": {state: [round(sizes[state, n]["peak"] / 2**20, 1) for n in (small, large)] for state in ("tokenizing", "cached")},
        "held_bytes_per_document": slope["cached", "held"],
        "peak_bytes_per_document_tokenizing": slope["tokenizing", "peak_tokens"],
        "peak_bytes_per_document_reading_the_cache": slope["cached", "peak_tokens"],
        "peak_bytes_per_document_packing": slope["cached", "peak"],
    }


def memory_of(folder: str, n: str) -> dict:
    """One measurement of `memory`: reads the data set of n documents, from the cache if it is there, and plans an epoch."""
    from benchmarks.trainers import read_status
    from data.config import DataConfig, SourceConfig
    from data.prepare import prepare
    from data.stream import Stream
    from data.tokenizer import Tokenizer

    source = SourceConfig(str(Path(folder) / f"{n}.jsonl"), "completion")
    tokenizer = Tokenizer.load(folder)
    trim = ctypes.CDLL(None).malloc_trim  # what is freed and not given back is not held
    trim(0)
    before = read_status("RssAnon")[0]
    docs = prepare(DataConfig((source,), tokens=2048), (source,), tokenizer, Path(folder) / f"cache{n}", 0, progress=False)
    peak_tokens = read_status("VmHWM")[0]
    stream = Stream(docs, tokens=2048, max_length=2048, seed=0)
    peak = read_status("VmHWM")[0]
    trim(0)
    held = read_status("RssAnon")[0]
    assert stream.steps_per_epoch > 1
    return {"held": held - before, "peak_tokens": peak_tokens, "peak": peak}


# -------------------------------------------------------------------------------------------------------------- help


def help_(quick: bool) -> dict:
    walls, cpus = [], []
    for _ in range(2 if quick else 9):
        wall, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        walls.append(time.perf_counter() - wall)
        cpus.append(end.ru_utime + end.ru_stime - cpu.ru_utime - cpu.ru_stime)
    return {"seconds": statistics.median(walls), "cpu_seconds": statistics.median(cpus)}


# --------------------------------------------------------------------------------------------------------------- run

CELLS: dict[str, Callable[[bool], dict]] = {
    "lora_ragged": lambda quick: lora(quick, ragged=True),
    "lora_unpadded": lambda quick: lora(quick, ragged=False),
    "packing": packing,
    "pipeline_completion": lambda quick: pipeline(quick, "completion"),
    "pipeline_chat": lambda quick: pipeline(quick, "chat"),
    "memory": memory,
    "help": help_,
}


def _cell(*arguments: str) -> dict:
    """Runs `--cell ...` in a process of its own and returns the JSON of its last line."""
    command = [sys.executable, "-m", "benchmarks.cpu", "--cell", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def commit() -> str:
    """What is run: the checkout's commit, and whether files are not as it has them; but for counts, which campaigns write."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+changes" * bool(git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results"))
    except (OSError, subprocess.CalledProcessError):
        return "no checkout"


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(gib), "load": round(os.getloadavg()[0], 1)}


def versions(packages: Iterable[str]) -> dict:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def main(argv: list[str]) -> int:
    if argv[:2] == ["--cell", "memory_of"]:
        print(json.dumps(memory_of(*argv[2:])))
        return 0
    if argv[:1] == ["--cell"]:
        print(json.dumps(CELLS[argv[1]](argv[2] == "quick")))
        return 0
    options = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="tiny sizes: shows that the benchmarks work")
    options.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS), metavar="NAME", help=", ".join(CELLS))
    options.add_argument("--out", type=Path, help="also write machine, versions and results to this file")
    args = options.parse_args(argv)

    found = {}
    for name in args.only:
        found[name] = _cell(name, "quick" if args.quick else "full")
        print(json.dumps({"cell": name, **found[name]}), flush=True)
    given = (["--quick"] if args.quick else []) + (["--only", *args.only] if len(args.only) < len(CELLS) else [])
    facts = {
        "command": " ".join(["python -m benchmarks.cpu", *given]),
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": versions(PACKAGES),
    }
    goals = [
        {
            "cell": g.cell,
            "number": g.key,
            "found": found[g.cell][g.key],
            "goal": f"{g.sign} {g.bound:g}",
            "met": g.met(found[g.cell][g.key]),
        }
        for g in GOALS
        if g.cell in found
    ]
    print(f"\n{'cell':<22}{'number':<28}{'found':>10}  goal")
    for row in goals:
        print(f"{row['cell']:<22}{row['number']:<28}{row['found']:>10.4f}  {row['goal']:<9}{'' if row['met'] else ' MISSED'}")
    if args.out:
        args.out.write_text(json.dumps({**facts, "goals": goals, "cells": found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
