"""Values into a model and out of it: Hugging Face folders, PEFT adapters, merged weights.

In: every rank works out which slices of which tensors make up its own parameters and copies only those from the mapped files;
no rank ever holds the model, and there is no communication. The headers of all files are checked against the model first,
so what is wrong with a folder is found on every rank alike, before anything is copied. Memory begins as NaN, and no NaN may be left
once all is loaded: neither an element that nothing was assigned to nor one of a damaged file reaches the first step.

Out: tensor by tensor the parameter is gathered (one is whole at a time), the adapter merged in, and the first rank writes; see
`model/tensor_folder.py` for how a folder is written, compared with the live values and only then published. Exports are
collectives: every rank calls them.

Merging computes W + scale * (B A) in fp32 on the CPU whatever the training device, so that the same adapter always merges
into the same bytes and no TF32 setting of a GPU reaches a saved weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model import build, peft_format
from model.arch import Arch
from model.config import LoraConfig
from model.hub import MODEL_FILES, TOKENIZER_FILES
from model.peft_format import PREFIX, Adapter, open_adapter
from model.tensor_folder import SHARD_BYTES, Check, Layout, Spec, TensorFolder, Value, compare, leads, listed, publish
from model.transforms.lora import adapted, apply_lora, is_adapter, leaf_names, select_linears
from model.weights import EMBEDDING, HEAD, NameMap, full, initialize, local, parameters_at_rest, region
from runtime.errors import ModelError
from runtime.files import has, read_json

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # stored dtypes that are converted on the way in
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}  # as in config.json
COUNTED_AT_ONCE = 1 << 24  # elements


# --------------------------------------------------------------------------------------------------------------------- in


def materialize(
    net: nn.Module, device: torch.device | str, seed: int, folder: str | Path | None, adapter: str | Path | None = None
) -> None:
    """Memory and values for a model on meta, sharded or not: weights from `folder` (None: fresh ones), and adapters from
    `adapter` (None: fresh ones). Every element of every parameter is given a value, or this raises.

    Raises:
        ModelError: a folder does not fit the model, or holds a NaN that this rank was to take.
    """
    allocate(net, device)
    net.reset_buffers(device)
    filled = load_weights(net, folder) if folder else initialize(net, seed, only=lambda name: not is_adapter(name))
    filled |= load_adapter(net, adapter) if adapter else initialize(net, seed, only=is_adapter)
    unset = {name for name, _ in parameters_at_rest(net)} - filled
    assert not unset, f"parameters without values: {listed(unset)}"
    _refuse_nan(net, folder, adapter)


def allocate(net: nn.Module, device: torch.device | str) -> None:
    """Memory for a model on meta: on `device`, and for the parameters in `net.on_host` on the host. Parameters are NaN.

    On CUDA the host's is pinned, or copies to the device would stop the host; FSDP2 pins its DTensors itself.
    """
    host, pin = {id(p) for name, p in net.named_parameters() if name in net.on_host}, torch.device(device).type == "cuda"

    def memory(t: Tensor) -> Tensor:
        if id(t) not in host:
            return torch.empty_like(t, device=device)
        return torch.empty_like(t, device="cpu") if isinstance(t, DTensor) else torch.empty_like(t, device="cpu", pin_memory=pin)

    net._apply(memory)  # what to_empty does
    for _, p in parameters_at_rest(net):
        if _has_nan(p):
            local(p).fill_(math.nan)


def _refuse_nan(net: nn.Module, folder: str | Path | None, adapter: str | Path | None) -> None:
    """No element of what this rank holds is NaN, or this raises: a user's error if the file has it, else one of ours."""
    for name, p in parameters_at_rest(net):
        if not (_has_nan(p) and (here := _nans(local(p)))):
            continue
        tensors, hf = _sources_of(net, folder, adapter).get(name, (None, ""))
        whole = tensors.read(hf) if tensors else torch.empty(0)
        there = _nans(whole)
        assert there, f"{name}: {here} elements were given no value"
        message = f"{there} of {whole.numel()} elements are NaN; the file is damaged, or was saved by a run that had failed"
        raise ModelError(f"{hf}: {message}", tensors.folder)


def _has_nan(t: Tensor) -> bool:
    """Can it be NaN, and be added up? Not integers, nor floats of 8 bits (torch 2.13 has no sum of them)."""
    return t.is_floating_point() and t.element_size() > 1


def _nans(t: Tensor) -> int:
    """How many elements are NaN. Their sum is one if any is, and makes no copy; infinities of both signs add up to NaN as well."""
    if not t.sum().isnan():
        return 0
    return sum(int(part.isnan().sum()) for part in t.reshape(-1).split(COUNTED_AT_ONCE))


def check_weights(net: nn.Module, folder: str | Path) -> None:
    """Does the folder hold exactly this model (which may be on meta)? Reads headers only.

    Raises:
        ModelError: it does not; the line says what differs.
    """
    _sources(net, TensorFolder(folder))


def load_weights(net: nn.Module, folder: str | Path) -> set[str]:
    """Copies the folder's tensors into the base parameters; adapters are left alone. Returns the names it filled.

    Integer or boolean tensors are refused, floats of any width are converted to the parameter's dtype.

    Raises:
        ModelError: a file is missing, damaged or outside the folder; names, shapes or dtypes are not the model's.
    """
    tensors = TensorFolder(folder)
    sources = _sources(net, tensors)
    parameters = dict(parameters_at_rest(net))
    for name, theirs in sources.items():
        _copy(parameters[name], tensors, theirs)
    return set(sources)


def load_adapter(net: nn.Module, folder: str | Path) -> set[str]:
    """Copies a PEFT adapter into the adapters of `net` (see `adapter_config`) and into the modules it trains in full.

    Raises:
        ModelError: the folder is no adapter we compute, or not one for this model as it was prepared.
    """
    adapter = open_adapter(folder)
    parameters, sources = dict(parameters_at_rest(net)), _adapter_sources(net, adapter)
    for name, hf in sources.items():
        _copy(parameters[name], adapter.tensors, hf)
    return set(sources)


def stored(net: nn.Module, base: str | Path, adapter: str | Path | None = None) -> Callable[[str], Tensor]:
    """A parameter's whole value by its name, from the folders of a model and of an adapter for it; headers are checked now.

    Raises:
        ModelError: a folder does not fit `net`.
    """
    sources = _sources_of(net, base, adapter)

    def value(name: str) -> Tensor:
        tensors, hf = sources[name]
        return tensors.read(hf)

    return value


def _sources_of(net: nn.Module, base: str | Path | None, adapter: str | Path | None) -> dict[str, tuple[TensorFolder, str]]:
    """Our name -> where a folder has it and its name there; what the adapter carries in full counts."""
    sources = {}
    if base:
        weights = TensorFolder(base)
        sources |= {name: (weights, hf) for name, hf in _sources(net, weights).items()}
    if adapter:
        update = open_adapter(adapter)
        sources |= {name: (update.tensors, hf) for name, hf in _adapter_sources(net, update).items()}
    return sources


def fits_adapter(net: nn.Module, folder: str | Path) -> None:
    """Is the adapter one for `net` as it was prepared: the same linears, rank and scale, names and shapes? Reads headers only.

    Raises:
        ModelError: it is not.
    """
    _adapter_sources(net, open_adapter(folder))


def _adapter_sources(net: nn.Module, adapter: Adapter) -> dict[str, str]:
    """Our name -> the adapter's, for every tensor it holds, once it fits the adapters of `net`."""
    folder, linears = adapter.tensors.folder, adapted(net)
    names = NameMap.of(net, [f"{n}.weight" for n in adapter.linears])
    theirs = {names.to_hf(name): linear for name, linear in linears.items()}
    if theirs.keys() != set(adapter.linears):
        raise ModelError(f"{listed(theirs.keys() ^ set(adapter.linears))}: not the linears that lora.targets selects", folder)
    for name, linear in theirs.items():
        rank, scale = linear.lora_A.weight.shape[0], linear.adapter.scale
        if rank != adapter.rank or not math.isclose(scale, adapter.scale, rel_tol=1e-6):
            here, there = f"rank {rank}, scale {scale:g}", f"rank {adapter.rank}, scale {adapter.scale:g}"
            raise ModelError(f"has {there}, but lora.rank and lora.alpha give {here} ({name})", folder)
    sources = {f"{name}.lora_{m}.weight": f"{PREFIX}{names.to_hf(name)}.lora_{m}.weight" for name in linears for m in "AB"}
    for hf in adapter.saved:
        sources[_saved_name(net, names, adapter, hf)] = PREFIX + hf
    parameters = dict(net.named_parameters())
    for name, hf in sources.items():
        _check_tensor(hf, adapter.tensors, parameters[name])
    return sources


def adapter_config(net: nn.Module, folder: str | Path) -> LoraConfig:
    """The `[lora]` section that prepares `net` for an adapter folder.

    Raises:
        ModelError: the folder is no adapter we compute, or not one for this model.
    """
    adapter = open_adapter(folder)
    names = NameMap.of(net, [f"{n}.weight" for n in adapter.linears])
    linears = {names.to_hf(name): name for name in select_linears(net, "all-linear")}
    if foreign := set(adapter.linears) - linears.keys():
        raise ModelError(f"adapts {listed(foreign)}, which is no linear layer of this model's decoder", folder)
    adapter.check_covers(list(linears))
    saved = dict.fromkeys(_saved_name(net, names, adapter, hf).rsplit(".", 1)[0] for hf in adapter.saved)
    chosen = tuple(linears[n] for n in adapter.linears)
    return LoraConfig(rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout, targets=chosen, train_modules=tuple(saved))


def _saved_name(net: nn.Module, names: NameMap, adapter: Adapter, hf: str) -> str:
    """Our name of a tensor that an adapter carries in full. Of a tied model it must carry both names, with equal values:
    PEFT keeps two copies, and with only one of them saved its model is no longer tied."""
    name = names.from_hf(hf)
    parameters = {n for n, _ in net.named_parameters()}
    if net.lm_head is None and name in (EMBEDDING, HEAD):
        both = [PREFIX + names.to_hf(n) for n in (EMBEDDING, HEAD)]
        if absent := [n for n in both if n not in adapter.tensors.specs]:
            raise ModelError(f"has {hf} but not {absent[0]}; this model's head and embedding are one tensor", adapter.tensors.folder)
        _require_equal(adapter.tensors, *both)
        return EMBEDDING
    if name not in parameters:
        raise ModelError(f"holds {hf}, which this model does not have", adapter.tensors.folder)
    return name


def _sources(net: nn.Module, tensors: TensorFolder) -> dict[str, str]:
    """Our name -> the folder's, for every base parameter, once everything about the headers is in order."""
    names = NameMap.of(net, tensors.specs)
    parameters = {name: p for name, p in net.named_parameters() if not is_adapter(name)}
    sources = {name: names.to_hf(name) for name in parameters}
    if HEAD not in parameters:  # tied: the folder may have either name, or both with equal values
        embedding, head = names.to_hf(EMBEDDING), names.to_hf(HEAD)
        if embedding not in tensors.specs and head in tensors.specs:
            sources[EMBEDDING] = head
        elif head in tensors.specs:
            _require_equal(tensors, embedding, head)
    missing = set(sources.values()) - tensors.specs.keys()
    unexpected = {n for n in tensors.specs.keys() - set(sources.values()) if names.aside(n) is None}
    if HEAD not in parameters:
        unexpected.discard(names.to_hf(HEAD))
    if missing or unexpected:
        parts = [f"{len(n)} {what} ({listed(n)})" for n, what in ((missing, "missing"), (unexpected, "unexpected")) if n]
        raise ModelError(f"not the tensors of this {net.arch.family} model: {', '.join(parts)}", tensors.folder)
    for name, theirs in sources.items():
        _check_tensor(theirs, tensors, parameters[name])
    return sources


def _check_tensor(name: str, tensors: TensorFolder, p: Tensor) -> None:
    dtype, shape = tensors.specs[name]
    if shape != tuple(p.shape):
        raise ModelError(f"{name} has shape {list(shape)}, but the model's is {list(p.shape)}", tensors.folder)
    if dtype not in FLOATS:
        raise ModelError(f"{name} has dtype {_short(dtype)}, which is not a weight's (fp32, bf16, fp16, fp64)", tensors.folder)


def _require_equal(tensors: TensorFolder, a: str, b: str) -> None:
    """Whole tensors are compared on every rank: a difference anywhere must be known to all."""
    if tensors.specs[a] != tensors.specs[b] or not torch.equal(tensors.read(a), tensors.read(b)):
        message = f"{a} and {b} differ, but config.json ties them; set tie_word_embeddings to false there to keep both"
        raise ModelError(message, tensors.folder)


@torch.no_grad()
def _copy(p: Tensor, tensors: TensorFolder, name: str) -> None:
    where = region(p)
    if all(s.start < s.stop for s in where):
        local(p).copy_(tensors.read(name, where))


# -------------------------------------------------------------------------------------------------------------------- out


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight: [out, in], a: [r, in], b: [out, r] on the CPU -> weight + scale * b a, fp32."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)


def export_full(
    net: nn.Module,
    out: str | Path,
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    check: Check | None = None,
) -> None:
    """Writes the model in Hugging Face layout, adapters merged in. A collective.

    Names and dtypes are those of `source`, the folder the model came from; `dtype` overrides the dtypes (and is then noted in
    config.json), and where the source has no weights its config.json's counts. Everything else is copied from `source`
    unchanged: config.json, generation_config.json, tensors that are not ours (a vision tower), and the tokenizer's files,
    which `tokenizer` replaces by another folder's.

    Raises:
        ModelError: an adapter was not trained (`_require_trained`), or see `publish`.
    """
    files = _model_files(Path(source), Path(tokenizer or source), dtype)
    parameters, values = dict(parameters_at_rest(net)), live(net)

    def trained(name: str) -> Tensor:
        whole = values(name)
        _require_trained(name, whole, parameters[name])
        return whole

    layout, value = _full(net, Path(source), dtype, trained)
    publish(out, layout, value, files, shard_bytes=shard_bytes, overwrite=overwrite, check=check)


def merge_folders(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    check: Callable[[nn.Module, Callable[[str], Tensor]], Check] | None = None,
) -> None:
    """What `export_full` writes of the base model with the adapter, from their folders, with one tensor in memory at a time.

    Tokenizer files are the adapter folder's if it has a tokenizer. `check` makes the last check of the model, on meta, and its values.

    Raises:
        ModelError: the adapter is not one of this base model, or see `publish`.
    """
    base, adapter = Path(base), Path(adapter)
    net = build(Arch.from_folder(base))
    apply_lora(net, adapter_config(net, adapter))
    values = stored(net, base, adapter)
    files = _model_files(base, adapter if (adapter / "tokenizer.json").is_file() else base, dtype)
    last = check(net, values) if check else None
    publish(out, *_full(net, base, dtype, values), files, shard_bytes=shard_bytes, overwrite=overwrite, check=last)


def verify_full(folder: str | Path, net: nn.Module, source: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Reads an export and compares it with the live model, byte by byte. A collective.

    `export_full` does this before it publishes; this is for a folder that has lain around.

    Raises:
        ModelError: it is not this model.
    """
    compare(Path(folder), *_full(net, Path(source), dtype, live(net)))


def live(net: nn.Module) -> Callable[[str], Tensor]:
    """A parameter's whole value by its name. A collective where it is sharded."""
    parameters = dict(parameters_at_rest(net))
    return lambda name: full(parameters[name])


def _full(net: nn.Module, source: Path, dtype: torch.dtype | None, fetch: Callable[[str], Tensor]) -> tuple[Layout, Value]:
    """Layout and values of the whole model as `source` names and types its tensors; `fetch` gives each parameter's value."""
    parameters, linears = dict(net.named_parameters()), adapted(net)
    stored = TensorFolder(source) if has_weights(source) else None
    known: Layout = stored.specs if stored else {}
    names = NameMap.of(net, known)
    fallback = DTYPE_NAMES.get(net.arch.dtype, torch.float32)
    ours = {names.to_hf(name): name for name in parameters if not is_adapter(name)}
    asides = [n for n in known if (rule := names.aside(n)) is not None and rule.keep]
    layout = {
        hf: Spec(dtype or (known[hf].dtype if hf in known else fallback), tuple(parameters[name].shape)) for hf, name in ours.items()
    } | {hf: known[hf] for hf in asides}

    def value(hf: str) -> Tensor | None:
        if hf not in ours:
            return stored.read(hf) if leads() else None
        name = ours[hf]
        module = name.removesuffix(".weight")
        parts = [name, f"{module}.lora_A.weight", f"{module}.lora_B.weight"] if module in linears else [name]
        whole = [fetch(part) for part in parts]
        if not leads():
            return None
        weight, *factors = (w.cpu() for w in whole)
        if factors:
            weight = merge(weight, *factors, linears[module].adapter.scale)
        return weight.to(layout[hf].dtype)

    return layout, value


def export_adapter(
    net: nn.Module,
    out: str | Path,
    cfg: LoraConfig,
    base: str,
    *,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    check: Check | None = None,
) -> None:
    """Writes what trains of a LoRA run in PEFT's layout, beside the files of `tokenizer` if given. A collective.

    base: the path or hub id of the base model, as the adapter's users should load it.

    Raises:
        ModelError: an adapter was not trained (`_require_trained`), or see `publish`.
    """
    layout, value, modules = _adapter(net)
    targets = _target_modules(net, NameMap.of(net))
    files = pass_through(Path(tokenizer), TOKENIZER_FILES) if tokenizer else {}
    files[peft_format.CONFIG] = peft_format.config_json(cfg, base, targets, modules)
    publish(out, layout, value, files, stem=peft_format.STEM, shard_bytes=2**63, overwrite=overwrite, check=check)


def verify_adapter(folder: str | Path, net: nn.Module) -> None:
    """Reads an adapter folder and compares it with the live model, byte by byte. A collective.

    Raises:
        ModelError: it is not this model's.
    """
    layout, value, _ = _adapter(net)
    compare(Path(folder), layout, value, peft_format.STEM)


def _adapter(net: nn.Module) -> tuple[Layout, Value, list[str]]:
    """Layout and values of what trains, and the modules among it that train in full."""
    names = NameMap.of(net)
    ours = {PREFIX + names.to_hf(name): name for name, p in parameters_at_rest(net) if p.requires_grad or is_adapter(name)}
    if net.lm_head is None and EMBEDDING in ours.values():  # PEFT keeps two copies of a tied tensor, and saves both
        ours[PREFIX + names.to_hf(HEAD)] = EMBEDDING
    modules = [hf.removeprefix(PREFIX).rsplit(".", 1)[0] for hf, name in ours.items() if not is_adapter(name)]
    parameters = dict(net.named_parameters())
    layout = {hf: Spec(parameters[name].dtype, tuple(parameters[name].shape)) for hf, name in ours.items()}

    def value(hf: str) -> Tensor | None:
        whole = full(parameters[ours[hf]])
        _require_trained(hf, whole, parameters[ours[hf]])
        return whole.cpu() if leads() else None

    return layout, value, list(dict.fromkeys(modules))


def _require_trained(name: str, whole: Tensor, p: Tensor) -> None:
    """B starts at zero, and a trained B has no zero rows. All zero, it would compute the base model under the name of an adapter.
    One rank's rows all zero beside others that are not would mean that only some shards trained or were gathered. Nothing
    later would show either."""
    if not name.endswith(".lora_B.weight"):
        return
    if not whole.any():
        raise ModelError(f"{name} is all zeros: nothing was learned there (is the learning rate 0?), so there is nothing to export")
    if not isinstance(p, DTensor):
        return
    ranks = math.prod(p.device_mesh.size(i) for i, at in enumerate(p.placements) if not at.is_replicate())
    used = [bool(chunk.any()) for chunk in whole.chunk(ranks) if len(chunk) >= 8]
    if any(used) and not all(used):
        raise ModelError(f"{name}: the rows of one rank are all zero and others are not; not every shard has trained")


def _target_modules(net: nn.Module, names: NameMap) -> list[str]:
    """Leaf names where those select exactly the adapted linears, whole names otherwise; always whole names in a multimodal
    model, whose other parts have linears of the same leaf names."""
    linears = list(adapted(net))
    leaves = tuple(leaf_names(linears))
    by_leaf = not names.prefixes and list(select_linears(net, leaves)) == linears
    return list(leaves) if by_leaf else [names.to_hf(n) for n in linears]


def _model_files(source: Path, tokenizer: Path, dtype: torch.dtype | None) -> dict[str, bytes | Path]:
    """The small files of a full export."""
    files: dict[str, bytes | Path] = pass_through(source, MODEL_FILES) | pass_through(tokenizer, TOKENIZER_FILES)
    if "config.json" not in files:
        raise ModelError("has no config.json to copy into the export", source)
    if dtype is not None:
        files["config.json"] = config_with_dtype(source / "config.json", dtype)
    return files


def has_weights(folder: Path) -> bool:
    return any((folder / f"model.safetensors{end}").exists() for end in ("", ".index.json"))


def pass_through(folder: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """Those of the files that the folder has.

    Raises:
        ModelError: one of them is no regular file, or a link out of the folder: an export would publish what it leads to.
    """
    return {name: folder / name for name in names if has(folder, name)}


def config_with_dtype(path: Path, dtype: torch.dtype) -> bytes:
    """config.json with its dtype replaced, under the key it uses, and nothing else changed."""
    config = read_json(path)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and (part is config or "dtype" in part or "torch_dtype" in part):
            part["torch_dtype" if "torch_dtype" in part else "dtype"] = _short(dtype)
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
