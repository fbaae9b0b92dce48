"""The weights of a checkpoint of a run, in Hugging Face or PEFT layout: what the run itself would export at that step.

    python -m tools.export --run out/run                     the newest intact checkpoint, into out/run/export_step_<n>
    python -m tools.export --run out/run --step 500 --out out/at-500
    python -m tools.export --run out/run --step best --out out/best
    python -m tools.export --run out/lora-run --merge        full weights with the adapter merged in

Runs on the CPU. Optimizer states are not loaded, and the base model only where its weights are part of the result. What was
written is loaded again and compared before the folder appears under its name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from runtime.errors import ConfigError, ModelError
from tools import command

if TYPE_CHECKING:
    from model.config import LoraConfig
    from model.decoder import Decoder
    from model.tensor_folder import Check
    from parallel.mesh import Mesh


def choose(run: Path, step: int | Literal["best"] | None) -> tuple[Path, dict]:
    """The newest intact checkpoint, that of `step`, or the intact one with the lowest evaluation loss, and its manifest; every byte was
    verified."""
    from runtime.checkpoint import store

    there = store.Store(run)
    found = there.ranked() if step == "best" else [path for path in there.steps() if step in (None, store.step_of(path))]
    if not found:
        missing = {
            None: "has no checkpoints",
            "best": "has no healthy checkpoint that was evaluated (eval.every must divide checkpoint.every)",
        }
        raise ModelError(missing.get(step, f"has no checkpoint of step {step}"), run / "checkpoints")
    for path in found:
        try:
            return path, store.verify(path)
        except store.Damaged as e:
            print(f"skipped {path}: {e}", file=sys.stderr)
    of_one = step not in (None, "best")
    raise ModelError(f"the checkpoint of step {step} is damaged" if of_one else "no checkpoint is intact", run / "checkpoints")


def _step(text: str) -> int | Literal["best"]:
    if text != "best" and not (text.isdecimal() and len(text) < 19):
        raise ConfigError("must be the number of a step, or best", "--step", text)
    return "best" if text == "best" else int(text)


@contextmanager
def one_rank() -> Iterator[Mesh]:
    """A mesh of size 1 on the CPU, whatever ranks the run had."""
    import torch
    import torch.distributed as dist

    from parallel.config import ParallelConfig
    from parallel.mesh import Mesh
    from parallel.start import Launch

    Launch().connect(torch.device("cpu"))
    try:
        yield Mesh.build(ParallelConfig(), torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def read_trained(checkpoint: Path, manifest: dict, net: Decoder) -> None:
    """Fills the parameters that train, in place, and reads nothing else of the checkpoint."""
    from runtime.checkpoint import shards

    trained = {f"model.{name}": p.detach() for name, p in net.named_parameters() if p.requires_grad}
    shards.read(checkpoint, manifest["files"], trained, some=True)


def last_check(net: Decoder, lora: LoraConfig | None, folder: Path | None, adapter_only: bool) -> Check:
    """What `net` computes, which holds a whole model, or only an adapter for the one in `folder`, against what is written."""
    from model import build, probe
    from model.safetensors_io import live, stored
    from model.transforms.lora import apply_lora

    if adapter_only and folder is None:
        return probe.same_adapter_headers(net)
    plain = build(net.arch)
    base = stored(plain, folder) if adapter_only else None  # before it has adapters, which are not there
    if lora is not None:
        apply_lora(plain, lora)
    row, trains, values = probe.row(net.arch.vocab_size), {n for n, p in net.named_parameters() if p.requires_grad}, live(net)
    said = probe.logprobs(plain, lambda name: values(name) if base is None or name in trains else base(name), row)
    return probe.same(net, row, said, base=folder if adapter_only else None)


def run(args: argparse.Namespace) -> None:
    import torch

    from model.arch import Arch
    from model.config import KernelsConfig
    from model.hub import fetch
    from model.safetensors_io import export_adapter, export_full, materialize
    from model.tensor_folder import fingerprint
    from runtime.config import load
    from train import RunConfig, assemble

    checkpoint, manifest = choose(args.run, args.step)
    cfg = load(RunConfig, checkpoint / "resolved.toml")
    folder = fetch(cfg.model.path, cfg.model.revision)
    pretrained = cfg.model.init == "pretrained"
    if manifest["identity"]["model"] != fingerprint(folder, weights=pretrained):
        raise ModelError(f"is no longer the model that {checkpoint} was trained from", folder)
    adapter_only = cfg.lora is not None and not (args.merge or cfg.output.merge)
    if args.merge and cfg.lora is None:
        raise ConfigError("has nothing to merge: this run trained the full weights", "--merge", True)
    if args.dtype != "auto" and adapter_only:
        raise ConfigError("is for full weights; an adapter keeps the dtype it trained in", "--dtype", args.dtype)

    out = args.out or args.run / f"export_{checkpoint.name}"
    with one_rank() as mesh:
        net, _ = assemble(replace(cfg, kernels=KernelsConfig()), Arch.from_folder(folder), mesh)
        if cfg.lora is not None and not adapter_only:
            materialize(net, "cpu", cfg.train.seed, folder if pretrained else None)
        else:
            net.to_empty(device="cpu")  # pages nobody writes take no memory: a base that is not exported costs none
        read_trained(checkpoint, manifest, net)
        check = last_check(net, cfg.lora, folder if pretrained else None, adapter_only)
        if adapter_only:
            export_adapter(net, out, cfg.lora, cfg.model.path, tokenizer=folder, overwrite=args.overwrite, check=check)
        else:
            dtypes = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
            dtype = dtypes[cfg.output.dtype if args.dtype == "auto" else args.dtype]
            export_full(net, out, folder, dtype=dtype, overwrite=args.overwrite, check=check)
    use = f"--model {cfg.model.path} --adapter {out}" if adapter_only else f"--model {out}"
    print(f"exported {checkpoint} to {out}, loaded again and compared\ntry it: python -m tools.generate {use} --chat 'Hello'")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of the run")
    steps = "the checkpoint of this step, or `best`: the one with the lowest evaluation loss (default: the newest intact one)"
    parser.add_argument("--step", type=_step, metavar="N", help=steps)
    parser.add_argument("--out", type=Path, help="folder to write (default: export_step_<n> in the run's folder)")
    parser.add_argument("--merge", action="store_true", help="of a LoRA run: full weights with the adapter merged in")
    parser.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of full weights; auto: as the run's output.dtype says"
    )
    parser.add_argument("--overwrite", action="store_true", help="move aside whatever lies in --out")
    return parser


@command
def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    run(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
