"""One LoRA run, ours or the HF Trainer's, held at every step until the other side has had its turn.

    python benchmarks/trainers.py ROLE JOB.json

`make` writes a model and an adapter whose B is not zero, with transformers and peft; `ours` trains through train.py's main,
unchanged; `theirs` with Trainer and peft. A side writes one JSON line after each step and waits for a line before the next,
so that two sides run in lockstep, A B A B, under the same load of the machine.

The learning rate is 0: every step does all the work of a step, and since the weights stay what they are, the loss over the
epoch must be the same whatever order and batches either side makes of the documents.

The reference roles import nothing of ours and must start outside the checkout: transformers takes our `kernels` for another's.
"""

from __future__ import annotations

import json
import os
import sys
import time


def read_status(*names: str) -> list[int]:
    """Bytes, of fields such as VmHWM (the most memory this process ever had) in /proc/self/status."""
    with open("/proc/self/status", encoding="utf-8") as file:
        found = dict(line.split(":", 1) for line in file)
    return [int(found[name].split()[0]) * 1024 for name in names]


class Turns:
    """Speaks on the standard output, which nobody else gets, and waits on the standard input."""

    def __init__(self):
        self._say = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._begun = self._cpu = 0.0
        self._start = 0

    def begin(self) -> None:
        self._start = self._start or read_status("VmRSS")[0]
        self._begun, self._cpu = time.perf_counter(), time.process_time()

    def end(self, **facts: float) -> None:
        """A step is done: says what it took and waits for the next turn."""
        took = {"seconds": time.perf_counter() - self._begun, "cpu_seconds": time.process_time() - self._cpu}
        print(json.dumps(took | facts | {"peak_bytes": read_status("VmHWM")[0], "start_bytes": self._start}), file=self._say)
        sys.stdin.readline()
        self.begin()


def make(job: dict) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**job["shape"])).float()
    model.save_pretrained(job["model"])
    model = get_peft_model(model, LoraConfig(r=job["rank"], lora_alpha=2 * job["rank"], target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    model.save_pretrained(job["adapter"])


def ours(job: dict) -> None:
    sys.path.insert(0, os.getcwd())
    import train
    from objective import lm

    turns, units, count = Turns(), [], lm.count

    def counted(batch) -> int:
        units.append(count(batch))
        return units[-1]

    lm.count = counted

    class Reporter(train.Reporter):
        seen = 0

        def __init__(self, *args):
            super().__init__(*args)
            turns.begin()  # model, optimizer and data are there; the first step follows

        def record(self, numbers: dict) -> None:
            super().record(numbers)
            tokens, self.seen = numbers["tokens"] - self.seen, numbers["tokens"]
            turns.end(tokens=tokens, slots=job["tokens"], units=units[-1], loss=numbers["loss"])

    train.Reporter = Reporter
    sys.exit(train.main(["--config", job["config"]]))


def theirs(job: dict) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    turns = Turns()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    step = {}

    def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
        """To the longest of the batch; where none is shorter there is no mask, so that attention takes its fast path."""
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
            "labels": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100),
        }
        batch["labels"][:, 0] = -100  # the first token has nothing before it, and is not counted either
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
        return batch if bool(mask.all()) else batch | {"attention_mask": mask}

    class Recorded(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            mask, learned = inputs.get("attention_mask"), int((inputs["labels"] >= 0).sum())
            slots = inputs["input_ids"].numel()
            loss = super().training_step(model, inputs, *args, **kwargs)
            step.update(tokens=slots if mask is None else int(mask.sum()), slots=slots, units=learned, loss=loss.item())
            return loss

    class Gate(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            turns.begin()

        def on_step_end(self, *args, **kwargs):
            turns.end(**step)

    args = TrainingArguments(
        output_dir=job["out"],
        per_device_train_batch_size=job["rows"],
        num_train_epochs=1,
        learning_rate=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        gradient_checkpointing=job["recompute"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    with open(job["data"], encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    Recorded(model=model, args=args, train_dataset=rows, data_collator=pad, callbacks=[Gate()]).train()


if __name__ == "__main__":
    with open(sys.argv[2], encoding="utf-8") as job_file:
        {"make": make, "ours": ours, "theirs": theirs}[sys.argv[1]](json.load(job_file))
