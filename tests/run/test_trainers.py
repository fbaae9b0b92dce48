"""Twenty steps beside the HF Trainer (and PEFT): same weights, same documents in the same order, fp32: the same losses.

The reference runs in a process of its own, started outside the checkout: transformers looks for packages called `kernels`.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.prepare import prepare
from data.stream import Stream
from data.tokenizer import Tokenizer
from runtime.config import load
from runtime.metrics import read
from tests import launch
from tests.tiny import write_chats, write_config, write_model
from train import RunConfig

STEPS, ACCUMULATE = 20, 3
REFERENCE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
job = json.load(open(sys.argv[1]))
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="eager")
if job["adapter"]:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
pad = max(len(d["input_ids"]) for d in job["documents"])
rows = [{"input_ids": d["input_ids"] + [0] * (pad - len(d["input_ids"])), "labels": d["labels"] + [-100] * (pad - len(d["labels"])),
         "attention_mask": [1] * len(d["input_ids"]) + [0] * (pad - len(d["input_ids"]))} for d in job["documents"]]
class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)
args = TrainingArguments(output_dir=job["out"], per_device_train_batch_size=job["rows"], gradient_accumulation_steps=job["accumulate"],
    max_steps=job["steps"], learning_rate=job["lr"], lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch",
    adam_beta2=0.999, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0)
trainer = InOrder(model=model, args=args, train_dataset=rows)
trainer.train()
losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
norms = [float(r["grad_norm"]) for r in trainer.state.log_history if "loss" in r]
json.dump({"loss": losses, "grad_norm": norms}, open(sys.argv[2], "w"))
"""


def documents(cfg: RunConfig) -> list[list[dict]]:
    """For each step what our plan trains, as rows for the reference: labels unshifted."""
    tokenizer = Tokenizer.load(Path(cfg.model.path))
    docs = prepare(cfg.data, cfg.data.sources, tokenizer, Path(cfg.data.cache), cfg.train.seed)
    stream = Stream(docs, tokens=cfg.data.tokens, max_length=cfg.data.longest, seed=cfg.train.seed, accumulate=ACCUMULATE)
    steps = []
    for step in range(1, STEPS + 1):
        rows = []
        for batch in stream.take(step):
            borders = [b for b in batch.cu_seqlens.unique().tolist() if b <= batch.filled]
            for a, b in itertools.pairwise(borders):
                rows.append({"input_ids": batch.tokens[a:b].tolist(), "labels": [-100, *batch.labels[a : b - 1].tolist()]})
        steps.append(rows)
    return steps


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_losses_equal_the_hf_trainers(tmp_path, lora):
    # documents longer than half a row: one each, so that a step is ACCUMULATE documents for both
    lr = 1e-2 if lora else 3e-3
    write_model(tmp_path / "model")
    data = write_chats(tmp_path / "data.jsonl", 36, shortest=18, longest=24)
    extra = f"[train]\nsteps = 1\naccumulate = {ACCUMULATE}\n[optim]\nlr = {lr}\n[schedule]\nkind = 'constant'\n[log]\nevery = 1\n"
    if lora:
        extra += "[lora]\nrank = 4\nalpha = 8\ntrain_modules = ['lm_head']\n"
    text = write_config(tmp_path / "c.toml", tmp_path / "model", data, tmp_path / "first", extra).read_text()
    (tmp_path / "c.toml").write_text(text.replace("tokens = 128\nmax_length = 128", "tokens = 96\nmax_length = 96"))
    argv = ["--config", str(tmp_path / "c.toml")]
    # weights for both sides: what one full step exported, with the adapter that one LoRA step made (so B is not zero)
    assert launch.run([*argv, "--output.merge=true"] if lora else argv, 1, tmp_path / "logs").wait() == [0]
    base = tmp_path / "first" / "export"
    argv += ["--model.init=pretrained", f"--model.path={base}", f"--train.steps={STEPS}"]
    adapter = None
    if lora:
        assert launch.run([*argv, "--train.steps=1", f"--output.path={tmp_path / 'adapter'}"], 1, tmp_path / "logs").wait() == [0]
        adapter = tmp_path / "adapter" / "export"
        argv += [f"--lora.adapter={adapter}"]
    world = 1 if lora else ACCUMULATE  # micro-batches after each other, or beside each other
    split = f"--train.accumulate={ACCUMULATE // world}"
    ranks = launch.run([*argv, split, f"--output.path={tmp_path / 'ours'}"], world, tmp_path / "logs", timeout_s=200)
    assert set(ranks.wait()) == {0}, ranks.output()
    ours = [r for r in read(tmp_path / "ours" / "metrics.jsonl") if "loss" in r]

    steps = documents(load(RunConfig, tmp_path / "c.toml", argv[2:]))
    rows = {len(s) for s in steps}
    job = {
        "model": str(base),
        "adapter": adapter and str(adapter),
        "documents": [row for step in steps for row in step],
        "rows": 1,
        "accumulate": ACCUMULATE,
        "steps": STEPS,
        "lr": lr,
        "out": str(tmp_path / "hf"),
    }
    assert rows == {ACCUMULATE}
    (tmp_path / "job.json").write_text(json.dumps(job))
    (tmp_path / "reference.py").write_text(REFERENCE)
    command = [sys.executable, "reference.py", "job.json", "result.json"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    theirs = json.loads((tmp_path / "result.json").read_text())

    assert len(ours) == len(theirs["loss"]) == STEPS
    assert theirs["loss"][0] - theirs["loss"][-1] > 0.4, "nothing was learned: the comparison would be of constants"
    for mine, loss, norm in zip(ours, theirs["loss"], theirs["grad_norm"]):
        assert mine["loss"] == pytest.approx(loss, rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert torch.tensor([r["loss"] for r in ours]).isfinite().all()
