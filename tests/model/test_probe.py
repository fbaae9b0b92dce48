"""What is exported is loaded again and must compute what the live model computes, or there is no folder."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from data.batch import Batch
from model import build, probe, safetensors_io, tensor_folder
from model.arch import Arch
from model.config import LoraConfig
from model.safetensors_io import export_adapter, export_full, live, materialize, stored
from objective.evaluate import logprobs, room, with_row
from parallel.config import ParallelConfig
from parallel.context import split
from parallel.local import run
from parallel.mesh import Mesh
from runtime.errors import ModelError
from tests.model.folders import digests, prepared, shard, train_a_little, write_model
from tests.model.golden import GOLDEN

LORA = LoraConfig(rank=4, alpha=32, train_modules=("model.norm",))
SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64}


def trained(folder, lora=LORA, compute=torch.float32):
    net = prepared(folder, lora, compute)
    materialize(net, "cpu", 0, folder)
    train_a_little(net)
    return net


def asked(net, row):
    with torch.no_grad():
        return net(row)


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "base")


@pytest.mark.parametrize("name", GOLDEN)
def test_block_by_block_it_is_the_same_computation(tmp_path, name):
    folder = write_model(tmp_path / "base", name)
    net = trained(folder, None)
    row, plain, held = probe.row(net.arch.vocab_size), build(net.arch), []

    def fetch(name):
        held.append(sum(any(not p.is_meta for p in block.parameters()) for block in plain.model.layers))
        return live(net)(name)

    found = probe.logprobs(plain, fetch, row)
    assert torch.equal(found, asked(net, row)) and found.std() > 0.05
    assert max(held) == 1 and all(p.is_meta for p in plain.parameters())


@pytest.mark.parametrize(
    "slots, longest, most, lengths",
    [(32, 16, 9, [11, 5, 16]), (500, 400, 3, [11, 5, 16]), (500, 400, 1, [11]), (20, 9, 2, [9, 5]), (3, 16, 1, [3]), (1, 1, 1, [1])],
)
def test_documents_that_a_row_has_room_for(slots, longest, most, lengths):
    """A run whose packs have at most so many documents has borders for those and for padding in pieces (data/stream.py)."""
    borders = torch.zeros(1 + most + -(-slots // longest), dtype=torch.int32)
    like = Batch(*(torch.zeros(slots, dtype=torch.int64),) * 3, borders, longest)
    row = probe.row(100, *room(like))
    assert row.cu_seqlens.diff().tolist() == lengths and row.max_seqlen <= longest
    assert len(row.labels) == sum(lengths) and row.labels.min() >= 0 and row.tokens.max() < 100
    batch = with_row(like, row)
    assert [x.shape for x in (batch.tokens, batch.labels, batch.positions)] == [(slots,)] * 3 and batch.cu_seqlens.shape == borders.shape
    assert batch.cu_seqlens.diff().max() <= longest and batch.cu_seqlens[-1] == slots and batch.filled == sum(lengths)
    expected = torch.cat([torch.arange(n) for n in batch.cu_seqlens.diff().tolist()])
    assert torch.equal(batch.positions.long(), expected)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_what_is_right_passes(tmp_path, compute):
    """Full, merged, adapter; in fp32, and where activations and weights are rounded to bf16."""
    folder = write_model(tmp_path / "base", "qwen3", compute)
    for name, lora in (("full", None), ("merged", LORA)):
        net = trained(folder, lora, compute)
        row = probe.row(net.arch.vocab_size)
        export_full(net, tmp_path / name, folder, check=probe.same(net, row, asked(net, row)))
        assert (tmp_path / name / "config.json").is_file()
    export_adapter(net, tmp_path / "adapter", LORA, "base", check=probe.same(net, row, asked(net, row), base=folder))
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_a_merge_that_forgets_the_adapter_is_seen(folder, tmp_path, monkeypatch):
    """Written and compared by the same wrong rule, every byte is as it was meant."""
    net = trained(folder)
    row = probe.row(net.arch.vocab_size)
    monkeypatch.setattr(safetensors_io, "merge", lambda weight, a, b, scale: weight.float())
    export_full(net, tmp_path / "unseen", folder)
    with pytest.raises(ModelError, match=r"computes something else than the live model: log-probabilities of 32 random tokens differ by"):
        export_full(net, tmp_path / "out", folder, check=probe.same(net, row, asked(net, row)))
    assert {p.name for p in tmp_path.iterdir()} == {"base", "unseen"}


def damage(monkeypatch, name, change):
    """Changes a file of the draft once it is complete, as a disk or a bug would."""
    finish = tensor_folder._Draft.finish

    def damaged(self):
        finish(self)
        path = self.folder / name
        path.write_bytes(change(path.read_bytes()))

    monkeypatch.setattr(tensor_folder._Draft, "finish", damaged)


def edited(**values):
    return lambda data: json.dumps(json.loads(data) | values).encode()


@pytest.mark.parametrize(
    "kind, file, change, message",
    [
        ("full", "config.json", edited(rms_norm_eps=0.5), "its config.json is not the trained model's: rms_norm_eps 0.5 instead of"),
        ("full", "config.json", edited(rope_theta=77.0), "its config.json is not the trained model's: ropes"),
        ("full", "config.json", lambda data: data[:-30], "not readable as JSON"),
        ("full", "model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), r"lm_head.weight reads back differently"),
        ("full", "model.safetensors", lambda data: data[:-1], "damaged or incomplete safetensors"),
        ("adapter", "adapter_config.json", edited(lora_alpha=33), "has rank 4, scale 8.25, but"),
        ("adapter", "adapter_config.json", edited(r=8), "does not fit r = 8"),
        ("adapter", "adapter_config.json", edited(use_rslora=True), "has rank 4, scale 16, but"),
        ("adapter", "adapter_model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "reads back differently"),
    ],
)
def test_damage_is_named_and_leaves_no_folder(folder, tmp_path, monkeypatch, kind, file, change, message):
    net = trained(folder)
    row = probe.row(net.arch.vocab_size)
    damage(monkeypatch, file, change)
    with pytest.raises(ModelError, match=message):
        if kind == "full":
            export_full(net, tmp_path / "out", folder, check=probe.same(net, row, asked(net, row)))
        else:
            export_adapter(net, tmp_path / "out", LORA, "base", check=probe.same(net, row, asked(net, row), base=folder))
    assert {p.name for p in tmp_path.iterdir()} == {"base"}


def test_another_base_is_seen(folder, tmp_path):
    """An adapter whose base model is not the one it was trained on."""
    net, other = trained(folder), write_model(tmp_path / "other")
    tensors = safetensors_io.TensorFolder(other)
    changed = {name: (tensors.read(name) * (3 if "q_proj" in name else 1)).contiguous() for name in tensors.specs}
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    row = probe.row(net.arch.vocab_size)
    with pytest.raises(ModelError, match="computes something else than the live model"):
        export_adapter(net, tmp_path / "out", LORA, "base", check=probe.same(net, row, asked(net, row), base=other))
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------------- layouts


def _export_laid_out(rank, world, folder, out, axes, compute):
    """The live model says what it says in its own layout; the first rank loads the folder alone. Then the same with a wrong merge."""
    net = prepared(folder, LORA, compute)
    shard(net, axes, compute)
    materialize(net, "cpu", 0, folder)
    train_a_little(net)
    mesh = Mesh.build(ParallelConfig(**axes), torch.device("cpu"))
    row = probe.row(net.arch.vocab_size)
    like = Batch(*(torch.zeros(45, dtype=torch.int64),) * 3, torch.zeros(9, dtype=torch.int32), 16)
    said = logprobs(net, split(with_row(like, row), mesh), mesh.sum_over_context, mesh.device)[: len(row.tokens)]
    export_full(net, out / "full", folder, check=probe.same(net, row, said))
    export_adapter(net, out / "adapter", LORA, "base", check=probe.same(net, row, said, base=folder))
    safetensors_io.merge = lambda weight, a, b, scale: weight.float()
    try:
        export_full(net, out / "wrong", folder, check=probe.same(net, row, said))
    except ModelError as error:
        return said.tolist(), str(error)


@pytest.mark.parametrize("axes", [{"shard": 2}, {"context": 2}, {"tensor": 2}, {"shard": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_in_any_layout(tmp_path, axes, compute):
    folder = write_model(tmp_path / "base", "llama", compute, **SHAPE)
    one = trained(folder, LORA, compute)
    expected = asked(one, probe.row(one.arch.vocab_size))
    export_full(one, tmp_path / "one", folder)
    for said, message in run(_export_laid_out, math.prod(axes.values()), folder, tmp_path, axes, compute):
        near = 1e-5 if compute == torch.float32 else 0.05
        assert expected.std() > 0.1 and (torch.tensor(said) - expected).abs().max() < near * expected.std() * 3
        assert "computes something else than the live model" in message
    assert digests(tmp_path / "full") == digests(tmp_path / "one") and (tmp_path / "adapter").is_dir()
    assert not (tmp_path / "wrong").exists() and not list(tmp_path.glob(".*"))


def _unlike_layers(rank, world, folder):
    """The folder has another number of layers than ranks count on: they stay together."""
    net = build(Arch.from_folder(folder))
    row = probe.row(net.arch.vocab_size)
    plain = build(net.arch)
    said = probe.logprobs(plain, stored(plain, folder), row)
    beats = []
    for ours in (1, 5):
        probe._first_rank(ours, lambda beat: probe.logprobs(plain, stored(plain, folder), row, lambda: (beats.append(1), beat())))
    try:
        probe._first_rank(3, lambda beat: (beat(), 1 / 0))
    except (ZeroDivisionError, RuntimeError) as error:
        return len(beats), str(error), said.shape[0]


def test_ranks_stay_together_whatever_the_first_one_finds(folder):
    (beats, first, _), (none, second, _) = run(_unlike_layers, 2, folder)
    assert (beats, none) == (4, 0) and first == "division by zero" and second == "rank 0: division by zero"


# ------------------------------------------------------------------------------------------------ adapters without training


@pytest.mark.parametrize("axes", [{"shard": 1}, {"shard": 2}], ids=str)
def test_an_adapter_that_learned_nothing_is_refused_by_name(folder, tmp_path, axes):
    for message in run(_untrained, math.prod(axes.values()), folder, tmp_path / "out", axes):
        assert message == (
            "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight is all zeros: nothing was learned there (is the learning rate 0?), "
            "so there is nothing to export",
            "model.layers.1.mlp.up_proj.lora_B.weight is all zeros: nothing was learned there (is the learning rate 0?), "
            "so there is nothing to export",
        )
    assert not (tmp_path / "out").exists()


def _untrained(rank, world, folder, out, axes):
    net = prepared(folder, LORA)
    shard(net, axes)
    materialize(net, "cpu", 0, folder)
    train_a_little(net)
    with torch.no_grad():
        net.model.layers[1].mlp.up_proj.lora_B.weight.zero_()
    messages = []
    for export in (lambda: export_adapter(net, out, LORA, "base"), lambda: export_full(net, out, folder)):
        try:
            export()
        except ModelError as error:
            messages.append(str(error))
    return tuple(messages)
