"""A data set that makes itself: short chat records of skills whose answers can be checked. What the quickstart trains on.

    python -m tools.skills --out out/quickstart/data

    skills.jsonl      2,000 records of each skill in SKILLS, for training
    spell.jsonl       2,000 of the skill in LATER, which the trained model is then taught with LoRA
    held_out.jsonl    100 questions of every skill, with operands that occur in no training record

A record is {"messages": [{"role": "user", "content": "What is 38 + 7?"}, {"role": "assistant", "content": "45"}]}; a held-out
one ends with the question and has `skill` and `answer` beside it.

Held out by construction: a question is a phrasing of operands (38 and 7), and a hash of the operands alone decides which side
they are on. So a model has never seen 38 + 7, in no phrasing, nor those numbers to be sorted, in no order: what it answers
right, it computes.

Everything follows from the seed. `random.random()` is the only source of chance, the one method whose sequence Python promises
to keep, so that the files are equal byte for byte everywhere; a test pins their hash.

    python -m tools.skills --tokenizer train_configs/quickstart/model

trains the tokenizer on all of it, deterministically; that is how the committed one was made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RECORDS, HELD_OUT = 2000, 100  # of each skill, if it has as many different questions
MONTHS = {"January": 31, "February": 28, "March": 31, "April": 30, "May": 31, "June": 30}
MONTHS |= {"July": 31, "August": 31, "September": 30, "October": 31, "November": 30, "December": 31}
UNITS = (
    ("kilometers", "meters", 1000),
    ("meters", "centimeters", 100),
    ("centimeters", "millimeters", 10),
    ("kilograms", "grams", 1000),
    ("liters", "milliliters", 1000),
    ("euros", "cents", 100),
)
DISHES = ("apple", "bread", "cheese", "milk", "rice", "tea", "salt", "soup", "egg", "fish")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Question(NamedTuple):
    operands: tuple  # what decides between training and held-out
    prompt: str
    answer: str


class Dice:
    """Draws that depend on the seed alone."""

    def __init__(self, seed: str):
        self._random = random.Random(seed).random

    def number(self, low: int, high: int) -> int:
        return low + int(self._random() * (high - low + 1))

    def one(self, *options: str) -> str:
        return options[self.number(0, len(options) - 1)]

    def some(self, options: Sequence, count: int) -> list:
        """Different ones of them, in random order."""
        rest = list(options)
        return [rest.pop(self.number(0, len(rest) - 1)) for _ in range(count)]

    def word(self) -> str:
        return "".join(self.one(*LETTERS) for _ in range(self.number(3, 6)))


# --------------------------------------------------------------------------------------------------------------- skills


def add(dice: Dice) -> Question:
    a, b = dice.number(1, 99), dice.number(1, 9)
    return Question((a, b), dice.one(f"What is {a} + {b}?", f"Add {b} to {a}.", f"{a} plus {b}?"), str(a + b))


def subtract(dice: Dice) -> Question:
    a, b = dice.number(10, 99), dice.number(1, 9)
    return Question((a, b), dice.one(f"What is {a} - {b}?", f"Take {b} from {a}.", f"{a} minus {b}?"), str(a - b))


def dates(dice: Dice) -> Question:
    month, later = dice.one(*MONTHS), dice.number(2, 9)
    day = dice.number(1, MONTHS[month] - later)  # within the month
    return Question((month, day, later), f"What is {later} days after {month} {day}?", f"{month} {day + later}")


def units(dice: Dice) -> Question:
    big, small, factor = UNITS[dice.number(0, len(UNITS) - 1)]
    n = dice.number(2, 999)
    return Question((big, n), f"How many {small} are {n} {big}?", f"{n * factor} {small}")


def sort(dice: Dice) -> Question:
    numbers = dice.some(range(10), dice.number(3, 5))
    ordered = sorted(numbers)
    return Question(tuple(ordered), f"Sort {', '.join(map(str, numbers))}.", ", ".join(map(str, ordered)))


def lookup(dice: Dice) -> Question:
    dishes = dice.some(DISHES, dice.number(3, 5))
    prices = [dice.number(1, 9) for _ in dishes]
    menu = ", ".join(f"{dish} {price}" for dish, price in zip(dishes, prices))
    row = dice.number(1, len(dishes))
    return Question((*dishes, *prices), f"Menu: {menu}. What does item {row} cost?", str(prices[row - 1]))


def reverse(dice: Dice) -> Question:
    word = dice.word()
    return Question((word,), f'Reverse "{word}".', f'"{word[::-1]}"')


def upper(dice: Dice) -> Question:
    word = dice.word()
    return Question((word,), f'Write "{word}" in capital letters.', f'"{word.upper()}"')


def spell(dice: Dice) -> Question:
    word = dice.word()
    return Question((word,), f'Spell "{word}".', f'"{"-".join(word)}"')


SKILLS = (add, subtract, dates, units, sort, lookup, reverse, upper)
LATER = (spell,)  # what the base model must not know: LoRA teaches it
Skill = Callable[[Dice], Question]


# ------------------------------------------------------------------------------------------------------------- data set


def is_held_out(skill: str, operands: tuple) -> bool:
    """One in ten operands, decided by nothing but themselves."""
    return hashlib.sha256(repr((skill, operands)).encode()).digest()[0] < 26


def make(skill: Skill, seed: int, records: int = RECORDS, held_out: int = HELD_OUT) -> tuple[list[Question], list[Question]]:
    """Different questions for training and different ones held out; fewer where a skill does not have that many."""
    dice = Dice(f"{seed}:{skill.__name__}")
    sides: tuple[dict, dict] = {}, {}
    limits = (records, held_out)
    for _ in range(40 * records):
        question = skill(dice)
        side = is_held_out(skill.__name__, question.operands)
        if len(sides[side]) < limits[side]:
            sides[side].setdefault(question.prompt, question)
    return tuple(list(side.values()) for side in sides)


def write(out: Path, seed: int = 0, records: int = RECORDS, held_out: int = HELD_OUT) -> dict[str, tuple[int, int]]:
    """Writes the three files. Returns how many records of each skill are for training and how many are held out."""
    out.mkdir(parents=True, exist_ok=True)
    sides = {skill.__name__: make(skill, seed, records, held_out) for skill in (*SKILLS, *LATER)}
    for name, skills in (("skills", SKILLS), ("spell", LATER)):
        _write(out / f"{name}.jsonl", (_record(q, True) for skill in skills for q in sides[skill.__name__][0]))
    _write(out / "held_out.jsonl", ({"skill": s} | _record(q, False) | {"answer": q.answer} for s, (_, qs) in sides.items() for q in qs))
    return {name: (len(train), len(test)) for name, (train, test) in sides.items()}


def _record(question: Question, answered: bool) -> dict:
    messages = [{"role": "user", "content": question.prompt}, {"role": "assistant", "content": question.answer}]
    return {"messages": messages if answered else messages[:1]}


def _write(path: Path, records: Iterator[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8", newline="\n")


# ------------------------------------------------------------------------------------------------------------ tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def train_tokenizer(seed: int = 0) -> Tokenizer:
    """A byte-level BPE of the data set, in which a digit, a letter between quotes, and every other frequent word is one token.

    A word between quotes is something to be worked on letter by letter, so merges may not hide its letters; the first two
    splits cut quoted parts out and into characters. Any text can be encoded: what is not in the data falls back to bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    split = pre_tokenizers.Split
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            split(Regex(r' ?"[^"]*"'), "isolated"),
            split(Regex(r'\A[^"]+\z| ?"|.'), "isolated"),
            split(Regex(r" ?\d| ?\p{L}+| ?[^\s\p{L}\d]|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=20,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (
        f"{role}\n{text}" for skill in (*SKILLS, *LATER) for q in make(skill, seed)[0] for role, text in zip(("user", "assistant"), q[1:])
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# -------------------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.skills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder for the data set")
    what.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="train the tokenizer, and write FOLDER/tokenizer.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=int, default=RECORDS, metavar="N", help=f"training records of a skill (default {RECORDS})")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, metavar="N", help=f"held-out questions of a skill (default {HELD_OUT})")
    args = parser.parse_args(argv)
    if args.tokenizer:
        train_tokenizer(args.seed).save(str(args.tokenizer / "tokenizer.json"))
        return 0
    for name, (train, held_out) in write(args.out, args.seed, args.records, args.held_out).items():
        print(f"{name:<10}{train:>6} records{held_out:>6} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
