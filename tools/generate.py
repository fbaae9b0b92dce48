"""Text from a model folder or hub id: greedy or sampled, batched, with a KV cache.

    python -m tools.generate --model out/run/export --prompt "Once upon a time"
    python -m tools.generate --model out/run/export --chat "What is 12 * 7?"          through the model's own chat template
    python -m tools.generate --model Qwen/Qwen3-0.6B --adapter out/run/export --file prompts.jsonl > answers.jsonl

A line of --file is an object with `prompt` (text) or `messages` (a conversation); it is printed again with a `completion`.
Answers end at any token that the tokenizer or generation_config.json says ends one.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import ConfigError, DataError
from tools import command

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data.tokenizer import Tokenizer
    from model.decoder import Decoder


def generate(
    net: Decoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch: int = 128,
) -> list[list[int]]:
    """Continues every prompt until a token of `eos_ids`, which is left out, or `max_new_tokens`.

    `temperature` 0 takes the likeliest token. Otherwise a token is drawn from softmax(logits / temperature), cut to the `top_k`
    likeliest (0: all) and of those to the fewest that hold `top_p` of the probability. Every prompt has random numbers of its
    own, so an answer does not depend on what else is in the batch.

    Args:
        prompts: token ids, none empty.
        batch: sequences computed at a time; memory grows with it.
    """
    import torch

    def numbers(prompt: int) -> list[float]:
        source = random.Random(f"{seed}:{prompt}")  # torch's CPU generator would keep 32 bits of a combined seed
        return [source.random() for _ in range(max_new_tokens)]

    pick = Greedy() if temperature == 0 else Sampled(temperature, top_p, top_k)
    training = net.training
    net.eval()
    try:
        answers = []
        for start in range(0, len(prompts), batch):
            group = prompts[start : start + batch]
            draws = torch.tensor([numbers(start + i) for i in range(len(group))], dtype=torch.float64)
            answers += _continue(net, group, max_new_tokens, frozenset(eos_ids), pick, draws)
        return answers
    finally:
        net.train(training)


def _continue(net: Decoder, prompts: list[list[int]], limit: int, eos_ids: frozenset[int], pick, draws: Tensor) -> list[list[int]]:
    """One batch. draws: [B, limit] uniform in [0, 1)."""
    from model.cache import Cache

    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the cache continues
    running = set(rows)
    cache = Cache(net, len(prompts), max(map(len, prompts)) + limit)
    with cache.installed():
        logits = cache.prefill(prompts)
        for step in range(limit):
            tokens = pick(logits, draws[rows, step])
            for prompt, token in zip(rows, tokens.tolist()):
                if token in eos_ids:
                    running.discard(prompt)
                elif prompt in running:
                    answers[prompt].append(token)
            if not running or step + 1 == limit:
                return answers
            if 2 * len(running) <= len(rows):  # halve the batch rather than copy the cache for every sequence that ends
                kept = [row for row, prompt in enumerate(rows) if prompt in running]
                cache.keep(kept)
                rows, tokens = [rows[row] for row in kept], tokens[kept]
            logits = cache.step(tokens)
    return answers


class Greedy:
    def __call__(self, logits: Tensor, draws: Tensor) -> Tensor:
        """logits: [B, V] -> the likeliest token, [B] int64."""
        return logits.argmax(-1)


class Sampled:
    def __init__(self, temperature: float, top_p: float = 1.0, top_k: int = 0):
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k

    def __call__(self, logits: Tensor, draws: Tensor) -> Tensor:
        """logits: [B, V], draws: [B] uniform in [0, 1) -> [B] int64, by inverting the distribution function."""
        p, order = (logits / self.temperature).softmax(-1).double().sort(-1, descending=True)
        before = p.cumsum(-1) - p  # probability of all likelier tokens
        p[before >= self.top_p] = 0.0  # the likeliest always stays
        if self.top_k:
            p[:, self.top_k :] = 0.0
        total = p.cumsum(-1)
        chosen = (total <= draws.to(p.device)[:, None] * total[:, -1:]).sum(-1, keepdim=True)
        return order.gather(-1, chosen.clamp(max=p.shape[-1] - 1))[:, 0]


def read_rows(path: Path) -> list[dict]:
    """The objects of a JSONL file, each with a `prompt` or `messages`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"cannot be read: {e}", path) from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise DataError(f"is not JSON: {e}", path, number) from None
        if not isinstance(row, dict) or not (isinstance(row.get("prompt"), str) or isinstance(row.get("messages"), list)):
            raise DataError("needs `prompt`, a text, or `messages`, a list", path, number)
        rows.append(row)
    return rows


def encode(rows: list[dict], tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    """Token ids of each row: a prompt as the tokenizer begins a text, a conversation up to where the model's reply begins."""
    from data.chat import Chat
    from data.sample import BadRecord

    chat = Chat(tokenizer) if any("messages" in row for row in rows) else None
    prompts = []
    for number, row in enumerate(rows, 1):
        try:
            if "messages" in row:
                ids = tokenizer.encode(chat.render(row["messages"], row.get("tools"), generation_prompt=True))
            else:
                ids = [*tokenizer.prefix_ids, *tokenizer.encode(row["prompt"])]
        except (BadRecord, AttributeError, TypeError) as e:  # the latter two: messages that are no list of objects
            raise DataError(f"prompt {number}: {e}") from None
        if not ids:
            raise DataError(f"prompt {number} is empty")
        if max(ids) >= vocab_size:
            raise DataError(f"prompt {number} holds token {max(ids)}, but the model's embeddings have {vocab_size} rows")
        prompts.append(ids)
    return prompts


def place(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """The device and dtype that `auto` stands for: CUDA if there is one; bf16 there, fp32 on the CPU."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("is not available here; leave it out or use cpu", "--device", device)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    dtype = ("bf16" if device == "cuda" else "fp32") if dtype == "auto" else dtype
    return device, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.generate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder in Hugging Face layout, or a hub id")
    parser.add_argument("--adapter", help="folder or hub id of a PEFT adapter for it")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be given several times")
    what.add_argument("--chat", action="append", metavar="TEXT", help="a user's message to answer; may be given several times")
    what.add_argument("--file", type=Path, metavar="JSONL", help="prompts and conversations")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0, the default, takes the likeliest token each time")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the fewest tokens that hold this probability")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (default 0: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--batch", type=int, default=128, metavar="B", help="sequences computed at a time (default 128)")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 on CUDA, fp32 on the CPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def _check(args: argparse.Namespace) -> None:
    limits = {
        "max_new_tokens": (args.max_new_tokens >= 1, "must be at least 1"),
        "temperature": (0 <= args.temperature < float("inf"), "must be 0 or positive"),
        "top_p": (0 < args.top_p <= 1, "must be above 0 and at most 1"),
        "top_k": (args.top_k >= 0, "must be 0 or positive"),
        "batch": (args.batch >= 1, "must be at least 1"),
    }
    for name, (legal, message) in limits.items():
        if not legal:
            raise ConfigError(message, "--" + name.replace("_", "-"), getattr(args, name))


def run(args: argparse.Namespace) -> None:
    _check(args)
    rows = read_rows(args.file) if args.file else [{"prompt": text} for text in args.prompt or ()]
    rows += [{"messages": [{"role": "user", "content": text}]} for text in args.chat or ()]
    device, dtype = place(args.device, args.dtype)

    from data.tokenizer import Tokenizer
    from model import load_pretrained
    from model.hub import fetch

    folder = fetch(args.model)
    adapter = fetch(args.adapter) if args.adapter else None
    net = load_pretrained(folder, dtype, device, adapter)
    # an adapter was trained on its own copy of the tokenizer, where it has one: the template may differ
    tokenizer = Tokenizer.load(adapter if adapter and (adapter / "tokenizer.json").is_file() else folder)
    tokenizer.check_vocabulary(net.arch.vocab_size)
    prompts = encode(rows, tokenizer, net.arch.vocab_size)
    settings = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, "seed": args.seed, "batch": args.batch}
    answers = generate(net, prompts, args.max_new_tokens, tokenizer.eos_ids, **settings)
    for row, answer in zip(rows, answers):
        text = tokenizer.decode(answer, skip_special=True)
        print(json.dumps(row | {"completion": text}, ensure_ascii=False) if args.file else text, flush=True)


@command
def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    run(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
