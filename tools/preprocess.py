"""Tokenizes and packs the data of a config ahead of its run, and shows what will be trained.

    python -m tools.preprocess --config FILE.toml [--show N] [--section.key=value ...]

Reads the same config as train.py, with the same overrides, and does what a run does before its first step: finds and checks
the sources, tokenizes them into the cache (where the run finds them), packs them, and prints the report and the first N
documents (4, if not given) decoded, with the trained tokens marked. Every error in the data shows up here, without a GPU.
"""

from __future__ import annotations

import argparse
import sys

from runtime.config import parse_args
from runtime.errors import ConfigError
from tools import command
from train import RunConfig, read_inputs

ABOUT = (
    "Tokenizes and packs the data of a config ahead of its run, and shows what will be trained:"
    " a report, and the first N documents (--show N, 4 if not given) with the trained tokens marked."
)


def run(cfg: RunConfig, show: int) -> None:
    from data.stream import Stream

    inputs = read_inputs(cfg)
    place = {"tokens": cfg.data.tokens, "max_length": cfg.data.longest, "seed": cfg.train.seed}
    stream = Stream(inputs.documents, accumulate=cfg.train.accumulate, **place)
    print(inputs.documents.report(), stream.report(), sep="\n")
    if inputs.held_out is not None:
        print("held out:", inputs.held_out.report(), Stream(inputs.held_out, shuffle=False, **place).report(), sep="\n")
    if show:
        print(stream.preview(inputs.tokenizer, documents=show))


@command
def main(argv: list[str]) -> None:
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--show", default="4")
    args, rest = options.parse_known_args(argv)
    cfg = parse_args(RunConfig, rest, prog="python -m tools.preprocess [--show N]", about=ABOUT)
    if not args.show.isdecimal():
        raise ConfigError("must be a number of documents", "--show", args.show)
    run(cfg, int(args.show))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
