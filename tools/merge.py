"""A PEFT adapter merged into its base model: full weights in Hugging Face layout, W + scale * B A in fp32, then rounded.

    python -m tools.merge --adapter out/run/export --out out/merged
    python -m tools.merge --adapter out/run/export --base meta-llama/Llama-3.1-8B --out out/merged --dtype bf16

Needs no GPU and the memory of a few tensors, whatever the size of the model. What was written is loaded again and compared
with the base and its adapter before the folder appears under its name. Tensors that the adapter does not touch keep their bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import ModelError
from tools import command


def run(adapter: Path, base: str | None, out: Path, dtype: str, overwrite: bool) -> None:
    """Merges `adapter` into `base` (None: the model its config names) and writes `out`."""
    import torch

    from model import probe
    from model.hub import fetch
    from model.safetensors_io import merge_folders
    from model.tensor_folder import read_json

    config = adapter / "adapter_config.json"
    if not config.is_file():
        raise ModelError("no such file: an adapter is a folder in PEFT layout", config)
    named = base or read_json(config).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ModelError("names no base model; give one with --base", config)
    dtypes = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

    def check(net, values):
        row = probe.row(net.arch.vocab_size)
        return probe.same(net, row, probe.logprobs(net, values, row))

    merge_folders(fetch(named), adapter, out, dtype=dtypes[dtype], overwrite=overwrite, check=check)
    print(f"merged {adapter} into {named}: {out}\npython -m tools.generate --model {out} --prompt ...")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.merge", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the adapter, in PEFT layout")
    parser.add_argument("--base", help="its base model: a folder or a hub id (default: what adapter_config.json says)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of the weights; auto: the base model's")
    parser.add_argument("--overwrite", action="store_true", help="move aside whatever lies in --out")
    return parser


@command
def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    run(args.adapter, args.base, args.out, args.dtype, args.overwrite)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
