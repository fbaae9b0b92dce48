"""Files that would run code: none does. Each is live: read by the unsafe means it is made for, it makes a marker file.

A case is a file (`plant`), an unsafe reader of it, which lives in this file only, and what a run does with it (`use`), which either
refuses it in one line (`says`) or takes it for data (None).

    pickles     in every file that we read and that somebody somewhere stores as a pickle, and every kind of call a pickle can make
    templates   the ways out of jinja that are known, in each place a chat template can come from
    names       of modules, classes and files, where a loader would import or open what they name
    text        in configs and data, where a program would evaluate it
"""

from __future__ import annotations

import base64
import builtins
import contextlib
import importlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data.chat import Chat
from data.config import DataConfig, SourceConfig
from data.prepare import prepare
from data.tokenizer import Tokenizer
from model import build, load_pretrained
from model.arch import Arch
from model.config import LoraConfig
from model.hub import fetch
from model.safetensors_io import export_adapter, materialize
from model.transforms.lora import apply_lora
from parallel.local import run as on_ranks
from runtime.checkpoint import shards, store
from runtime.config import load
from runtime.errors import UserError
from tests.model.folders import prepared, train_a_little
from tests.model.folders import write_model as write_weights
from tests.resealed import reseal
from tests.runtime.saving import checkpointer, empty, save, whole
from tests.tiny import TEMPLATE, write_chats, write_config, write_tokenizer
from tools import merge
from train import RunConfig

STEP = "run/checkpoints/step_1"


class Case(NamedTuple):
    name: str
    plant: Callable[[Path], None]  # in the working directory, which holds all that `honest` makes; given the marker
    unsafe: Callable[[], object]
    use: Callable[[], object]
    says: str | None  # in the one line; None: it is data


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A model, an adapter, data and its tokens, a config and a run's checkpoint, all as they should be."""
    place, lora = tmp_path_factory.mktemp("honest"), LoraConfig(rank=2)
    write_weights(place / "model", vocab_size=write_tokenizer(place / "model"))
    net = prepared(place / "model", lora)
    materialize(net, "cpu", 0, place / "model")
    train_a_little(net)
    export_adapter(net, place / "adapter", lora, "model")
    write_config(place / "run.toml", Path("model"), Path("chats.jsonl"), Path("out"))
    write_chats(place / "chats.jsonl", 3)
    on_ranks(lambda rank, world: save(checkpointer(place / "run"), 1, "one"), 1)
    return place


@pytest.fixture
def place(honest, tmp_path, monkeypatch):
    shutil.copytree(honest, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path / "place"
    sys.modules.pop("evil", None)


# ----------------------------------------------------------------------------------------------------------------- uses


def tokenize(*paths: str) -> None:
    sources = tuple(SourceConfig(path=path, format="chat") for path in paths or ("chats.jsonl",))
    prepare(DataConfig(sources=sources), sources, Tokenizer.load("model"), Path("cache"), 0)


def load_model() -> None:
    load_pretrained("model")


def load_both() -> None:
    load_pretrained("model", adapter="adapter")


def load_config() -> RunConfig:
    return load(RunConfig, Path("run.toml"))


def read_checkpoint() -> None:
    shards.read(Path(STEP), store.verify(Path(STEP))["files"], whole(0))


def resume() -> None:
    def work(rank, world):
        ckpt = checkpointer(Path("run"))
        try:
            found = ckpt.find()
            ckpt.load(found, empty("one"))
            ckpt.rng(found)
        except UserError as error:
            return str(error)

    if (problem := on_ranks(work, 1)[0]) is not None:
        raise UserError(problem)


# -------------------------------------------------------------------------------------------------------------- pickles


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def a_pickle(marker: Path) -> bytes:
    return pickle.dumps(Call(Path(marker).touch))


OPCODES = {  # made without Python's pickler, which has one way to write a call
    "GLOBAL and REDUCE": "cos\nsystem\n(S'touch {}'\ntR.",
    "INST": "(S'touch {}'\nios\nsystem\n.",
    "OBJ": "(cos\nsystem\nS'touch {}'\no.",
    "__import__ and getattr": "cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'touch {}'\ntR.",
    "through the memo": "cos\nsystem\np0\n0g0\n(S'touch {}'\ntR.",
}
CALLS = {
    "os.system": lambda m: Call(os.system, f"touch {m}"),
    "eval": lambda m: Call(eval, f"open({str(m)!r}, 'w')"),
    "exec": lambda m: Call(exec, f"open({str(m)!r}, 'w')"),
    "open": lambda m: Call(builtins.open, str(m), "w"),
    "subprocess": lambda m: Call(subprocess.check_call, ["touch", str(m)]),
    "a method": lambda m: Call(Path(m).touch),
    "a pickle in a pickle": lambda m: Call(pickle.loads, a_pickle(m)),
    "a partial": lambda m: Call(partial(os.system, f"touch {m}")),
    "beside tensors": lambda m: {"weight": torch.zeros(2), "hook": Call(os.system, f"touch {m}")},
}
KINDS = {name: lambda m, text=text: text.format(m).encode("latin-1") for name, text in OPCODES.items()}
KINDS |= {name: lambda m, call=call: pickle.dumps(call(m)) for name, call in CALLS.items()}


def in_checkpoint(name: str, make: Callable[[Path], bytes]) -> Callable[[Path], None]:
    def plant(marker: Path) -> None:
        (Path(STEP) / name).write_bytes(make(marker))
        reseal(Path(STEP))

    return plant


def in_tensor_data(marker: Path) -> None:
    """Where the checkpoint's metadata says that a tensor lies."""
    torch.save(Call(Path(marker).touch), "forged.pt")
    forged, path = Path("forged.pt").read_bytes(), Path(STEP)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for entry in metadata.storage_data.values():
        entry.offset, entry.length = 0, len(forged)
        (path / entry.relative_path).write_bytes(forged)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(path)


def unpickle(path: str) -> Callable[[], object]:
    return lambda: pickle.loads(Path(path).read_bytes())


def instead(path: str, of: str = "", make: Callable[[Path], bytes] = a_pickle) -> Callable[[Path], None]:
    def plant(marker: Path) -> None:
        Path(of or path).unlink(missing_ok=True)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(make(marker))

    return plant


def torch_file(marker: Path) -> bytes:
    torch.save({"weight": Call(Path(marker).touch)}, "torch_file")
    return Path("torch_file").read_bytes()


def torch_load(path: str) -> Callable[[], object]:
    """From its bytes: by a name that ends in .safetensors torch would know better."""
    return lambda: torch.load(io.BytesIO(Path(path).read_bytes()), weights_only=False)


def in_cache(name: str, make: Callable[[Path], bytes]) -> Callable[[Path], None]:
    def plant(marker: Path) -> None:
        tokenize()
        (folder,) = (path for path in Path("cache").iterdir() if path.is_dir())
        (folder / name).write_bytes(make(marker))
        shutil.copy(folder / name, "planted")

    return plant


def array(marker: Path) -> bytes:
    np.save("array.npy", np.array([Call(Path(marker).touch)], dtype=object), allow_pickle=True)
    return Path("array.npy").read_bytes()


PICKLES = [
    *(
        Case(f".metadata: {kind}", in_checkpoint(".metadata", make), unpickle(f"{STEP}/.metadata"), read_checkpoint, "metadata refused: ")
        for kind, make in KINDS.items()
    ),
    Case("tensor data", in_tensor_data, torch_load(f"{STEP}/__0_0.distcp"), resume, "cannot be read"),
    Case("random state", in_checkpoint("rng_0.safetensors", a_pickle), unpickle(f"{STEP}/rng_0.safetensors"), resume, "rng_0|[Hh]eader"),
    Case("state.json", in_checkpoint("state.json", a_pickle), unpickle(f"{STEP}/state.json"), resume, "state.json: is not one of ours"),
    Case("MANIFEST.json", instead(f"{STEP}/MANIFEST.json"), unpickle(f"{STEP}/MANIFEST.json"), resume, "no checkpoint is intact"),
    Case(
        "pytorch_model.bin",
        instead("model/pytorch_model.bin", "model/model.safetensors", torch_file),
        torch_load("model/pytorch_model.bin"),
        load_model,
        "only pytorch_model.bin: pickled weights can run code when loaded and are not read",
    ),
    Case(
        "consolidated.00.pth",
        instead("model/consolidated.00.pth", "model/model.safetensors", torch_file),
        torch_load("model/consolidated.00.pth"),
        load_model,
        "only consolidated.00.pth: pickled weights",
    ),
    Case(
        "a torch file named model.safetensors",
        instead("model/model.safetensors", make=torch_file),
        torch_load("model/model.safetensors"),
        load_model,
        "damaged or incomplete safetensors file",
    ),
    Case("model.safetensors", instead("model/model.safetensors"), unpickle("model/model.safetensors"), load_model, "damaged or incomplete"),
    Case(
        "adapter_model.bin",
        instead("adapter/adapter_model.bin", "adapter/adapter_model.safetensors", torch_file),
        torch_load("adapter/adapter_model.bin"),
        load_both,
        "only adapter_model.bin: pickled weights",
    ),
    Case(
        "adapter_model.safetensors",
        instead("adapter/adapter_model.safetensors"),
        unpickle("adapter/adapter_model.safetensors"),
        load_both,
        "damaged or incomplete",
    ),
    Case("adapter_config.json", instead("adapter/adapter_config.json"), unpickle("adapter/adapter_config.json"), load_both, "as JSON"),
    Case("config.json", instead("model/config.json"), unpickle("model/config.json"), load_model, "not readable as JSON"),
    Case("tokenizer.json", instead("model/tokenizer.json"), unpickle("model/tokenizer.json"), tokenize, "is not a tokenizer"),
    Case(
        "tokenizer.model",
        instead("model/tokenizer.model", "model/tokenizer.json"),
        unpickle("model/tokenizer.model"),
        tokenize,
        "has no tokenizer.json; it has tokenizer.model: convert it once",
    ),
    Case(
        "tokenizer_config.json",
        instead("model/tokenizer_config.json"),
        unpickle("model/tokenizer_config.json"),
        tokenize,
        "readable as JSON",
    ),
    Case("chat_template.jinja", instead("model/chat_template.jinja"), unpickle("model/chat_template.jinja"), tokenize, "is not UTF-8"),
    Case("tokens in the cache", in_cache("tokens.bin", array), lambda: np.load("planted", allow_pickle=True), tokenize, None),
    Case("index of the cache", in_cache("index.bin", array), lambda: np.load("planted", allow_pickle=True), tokenize, None),
    Case("meta.json of the cache", in_cache("meta.json", a_pickle), unpickle("planted"), tokenize, None),
    Case("chats.jsonl", instead("chats.jsonl"), unpickle("chats.jsonl"), tokenize, "chats.jsonl:1: byte 0x80 .* is not UTF-8"),
    Case("chats.json", instead("chats.json"), unpickle("chats.json"), partial(tokenize, "chats.json"), "is not UTF-8"),
    Case("chats.csv", instead("chats.csv"), unpickle("chats.csv"), partial(tokenize, "chats.csv"), "UTF-8"),
    Case(
        "chats.npy",
        instead("chats.npy", make=array),
        lambda: np.load("chats.npy", allow_pickle=True),
        partial(tokenize, "chats.npy"),
        "its name must end in",
    ),
    Case("chats.pkl", instead("chats.pkl"), unpickle("chats.pkl"), partial(tokenize, "chats.pkl"), "its name must end in"),
    Case("chats.parquet", instead("chats.parquet"), unpickle("chats.parquet"), partial(tokenize, "chats.parquet"), "parquet|pyarrow"),
    Case("run.toml", instead("run.toml"), unpickle("run.toml"), load_config, "is not UTF-8"),
]

# ------------------------------------------------------------------------------------------------------------ templates

GLOBALS = "__init__.__globals__"
ESCAPES = {
    "cycler": f"cycler.{GLOBALS}.os.popen('touch MARK').read()",
    "joiner": f"joiner.{GLOBALS}['os'].system('touch MARK')",
    "namespace": f"namespace.{GLOBALS}.os.system('touch MARK')",
    "an instance": f"joiner(',').{GLOBALS}.os.system('touch MARK')",
    "lipsum": "lipsum.__globals__.os.system('touch MARK')",
    "self": f"self.{GLOBALS}.__builtins__.__import__('os').system('touch MARK')",
    "the context": f"self._TemplateReference__context.cycler.{GLOBALS}.os.system('touch MARK')",
    "attr": "(cycler|attr('__init__')|attr('__globals__'))['os'].system('touch MARK')",
    "attr of undefined": "(nothing|attr('__init__')).__globals__.__builtins__.open('MARK', 'w')",
    "joined names": "cycler['__in' + 'it__']['__glo' + 'bals__']['os'].system('touch MARK')",
    "escaped names": r"cycler['\x5f\x5finit\x5f\x5f']['\x5f\x5fglobals\x5f\x5f']['os'].system('touch MARK')",
    "listed names": "cycler[['__init', '__']|join][('__globals', '__')|join]['os'].system('touch MARK')",
    "formatted names": "cycler['%s%s%s'|format('__', 'init', '__')]['%s%s%s'|format('__', 'globals', '__')]['os'].system('touch MARK')",
    "replaced names": "cycler['..init..'|replace('.', '_')]['..globals..'|replace('.', '_')]['os'].system('touch MARK')",
    "map": f"([cycler]|map(attribute='{GLOBALS}')|first).os.system('touch MARK')",
    "groupby": "([cycler]|groupby('__init__'))[0].grouper.__globals__.os.system('touch MARK')",
    "raise_exception": "raise_exception.__globals__.__builtins__['open']('MARK', 'w')",
    "strftime_now": "strftime_now.__globals__.__builtins__['open']('MARK', 'w')",
    "a generator's frame": "(messages|map('string')).gi_frame.f_builtins['open']('MARK', 'w')",
    "a method of a string": f"''.join.__self__.__class__.__mro__ and cycler.{GLOBALS}.os.system('touch MARK')",
}
BLOCKS = {
    "subclasses of object": "{% for c in ''.__class__.__base__.__subclasses__() %}{% if c.__name__ == 'Popen' %}"
    "{{ c(['touch', 'MARK']).wait() }}{% endif %}{% endfor %}",
    "the content's class": "{% for c in messages[0].content.__class__.__base__.__subclasses__() %}{% if c.__name__ == 'Popen' %}"
    "{{ c(['touch', 'MARK']).wait() }}{% endif %}{% endfor %}",
    "subclasses of dict's base": "{% for c in dict.__base__.__subclasses__() %}{% if c.__name__ == 'catch_warnings' %}"
    "{{ c.__init__.__globals__.__builtins__.open('MARK', 'w') }}{% endif %}{% endfor %}",
    "a variable": f"{{% set f = cycler.{GLOBALS} %}}{{{{ f.os.system('touch MARK') }}}}",
    "a macro": f"{{% macro f() %}}{{% endmacro %}}{{{{ f.{GLOBALS}.__builtins__.open('MARK', 'w') }}}}",
    "a caller": f"{{% macro f() %}}{{{{ caller.{GLOBALS}.__builtins__.open('MARK', 'w') }}}}{{% endmacro %}}"
    "{% call f() %}{% endcall %}",
    "a loop": f"{{% for m in messages %}}{{{{ loop.{GLOBALS}.__builtins__.open('MARK', 'w') }}}}{{% endfor %}}",
    "include": "{% include 'other.jinja' %}",
    "import": "{% import 'other.jinja' as other %}{{ other }}",
    "extends": "{% extends 'other.jinja' %}",
}
ESCAPES = {name: f"{{{{ {text} }}}}" for name, text in ESCAPES.items()} | BLOCKS


def raise_exception(text):
    raise ValueError(text)


def strftime_now(text):
    return text


def plain_jinja(text: str) -> str:
    """A chat template as careless programs render it."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader("."))
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(text).render(messages=[{"role": "user", "content": "hi"}], tools=None, add_generation_prompt=False)


def as_file(text: str) -> None:
    Path("model/chat_template.jinja").write_text(text, encoding="utf-8")


def as_config(text: str) -> None:
    edit("model/tokenizer_config.json", chat_template=text)


def as_named(text: str) -> None:
    edit("model/tokenizer_config.json", chat_template=[{"name": "default", "template": text}])


def edit(path: str, **changes: object) -> None:
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changes), encoding="utf-8")


def template_case(number: int, name: str, text: str) -> Case:
    put = (as_file, as_config, as_named)[number % 3]

    def plant(marker: Path) -> None:
        written = text.replace("MARK", str(marker))
        Path("planted").write_text(written)
        put(written)
        Path("other.jinja").write_text(ESCAPES["cycler"].replace("MARK", str(marker)))

    match = "the chat template (fails: |is not valid jinja: line 1: No filter named '(attr|format|groupby)')"
    return Case(f"{name} ({put.__name__})", plant, lambda: plain_jinja(Path("planted").read_text()), tokenize, match)


TEMPLATES = [template_case(i, *item) for i, item in enumerate(ESCAPES.items())]

# ---------------------------------------------------------------------------------------------------------------- names


def evil(folder: str, *more: Callable[[], None]) -> Callable[[Path], None]:
    """A module that makes the marker when it is imported, in `folder`; and what names it."""

    def plant(marker: Path) -> None:
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Model: pass\n")
        for work in more:
            work()

    return plant


def imports(folder: str) -> Callable[[], object]:
    def unsafe() -> None:
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        importlib.import_module("evil")

    return unsafe


def index_to(name: str, file: str, link: str = "") -> Callable[[Path], None]:
    """An index that takes one tensor from `name`; the pickle lies in `file`, to which `link` leads."""

    def plant(marker: Path) -> None:
        weights = Path("model/model.safetensors")
        tensors = load_file(weights)
        weights.rename("model/part.safetensors")
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_bytes(torch_file(marker))
        if link:
            Path(link).symlink_to(Path(file).resolve())
        where = dict.fromkeys(tensors, "part.safetensors") | {sorted(tensors)[0]: name.replace("HERE", os.getcwd())}
        Path("model/model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    return plant


def linked_weights(marker: Path) -> None:
    Path("model/model.safetensors").unlink()
    Path("outside.bin").write_bytes(torch_file(marker))
    Path("model/model.safetensors").symlink_to(Path("outside.bin").resolve())


def hooked_header(marker: Path) -> None:
    tensors = load_file("model/model.safetensors")
    hook = base64.b64encode(a_pickle(marker)).decode()
    save_file(tensors, "model/model.safetensors", {"format": "pickle", "hook": hook, "auto_map": "evil.Model"})


def unpickle_header() -> None:
    with safe_open("model/model.safetensors", "pt") as file:
        pickle.loads(base64.b64decode(file.metadata()["hook"]))


def other_base(marker: Path) -> None:
    shutil.copytree("model", "base")
    Path("base/model.safetensors").unlink()
    Path("base/pytorch_model.bin").write_bytes(torch_file(marker))
    edit("adapter/adapter_config.json", base_model_name_or_path="base")


def merge_adapter() -> None:
    merge.run(Path("adapter"), None, Path("merged"), "auto", False)


def setting(path: str, **changes: object) -> Callable[[], None]:
    return lambda: edit(path, **changes)


def toml(text: str) -> Callable[[], None]:
    return lambda: Path("run.toml").write_text(Path("run.toml").read_text() + text)


def extends_a_program() -> None:
    Path("run.toml").write_text('extends = "evil.py"\n')


NAMES = [
    Case(
        "auto_map of a model",
        evil("model", setting("model/config.json", auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Model"})),
        imports("model"),
        load_model,
        None,
    ),
    Case(
        "trust_remote_code in config.json",
        evil("model", setting("model/config.json", trust_remote_code=True, custom_pipelines={"text": {"impl": "evil.Model"}})),
        imports("model"),
        load_model,
        None,
    ),
    Case(
        "auto_map of a tokenizer",
        evil("model", setting("model/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Model", None]}, tokenizer_class="Evil")),
        imports("model"),
        tokenize,
        None,
    ),
    Case("custom_generate", evil("model/custom_generate"), imports("model/custom_generate"), load_model, None),
    Case(
        "model_type",
        evil("model", setting("model/config.json", model_type="evil")),
        imports("model"),
        load_model,
        'model_type="evil": is not supported',
    ),
    Case(
        "architectures",
        evil("model", setting("model/config.json", architectures=["evil.Model"])),
        imports("model"),
        load_model,
        "evil.Model is not supported",
    ),
    Case(
        "quantization_config",
        evil("model", setting("model/config.json", quantization_config={"quant_method": "evil", "module": "evil"})),
        imports("model"),
        load_model,
        "quantization_config",
    ),
    Case("index: above the folder", index_to("../out.bin", "out.bin"), torch_load("out.bin"), load_model, "files of its own folder"),
    Case("index: absolute", index_to("HERE/out.safetensors", "out.safetensors"), torch_load("out.safetensors"), load_model, "own folder"),
    Case("index: a pickle's name", index_to("w.bin", "model/w.bin"), torch_load("model/w.bin"), load_model, "only .safetensors files"),
    Case(
        "index: a link",
        index_to("x.safetensors", "out/w.bin", "model/x.safetensors"),
        torch_load("model/x.safetensors"),
        load_model,
        "is a link to .*outside its folder",
    ),
    Case(
        "index: a pickle under a good name",
        index_to("x.safetensors", "model/x.safetensors"),
        torch_load("model/x.safetensors"),
        load_model,
        "damaged or incomplete",
    ),
    Case("weights: a link", linked_weights, torch_load("model/model.safetensors"), load_model, "is a link to .*outside its folder"),
    Case("weights: the header", hooked_header, unpickle_header, load_model, None),
    Case(
        "adapter: auto_mapping",
        evil("adapter", setting("adapter/adapter_config.json", auto_mapping={"base_model_class": "Model", "parent_library": "evil"})),
        imports("adapter"),
        load_both,
        None,
    ),
    Case(
        "adapter: megatron_core",
        evil("adapter", setting("adapter/adapter_config.json", megatron_core="evil")),
        imports("adapter"),
        load_both,
        None,
    ),
    Case(
        "adapter: megatron_config",
        evil("adapter", setting("adapter/adapter_config.json", megatron_config={"module": "evil"}, megatron_core="evil")),
        imports("adapter"),
        load_both,
        "megatron_config",
    ),
    Case(
        "adapter: peft_type",
        evil("adapter", setting("adapter/adapter_config.json", peft_type="evil.Model")),
        imports("adapter"),
        load_both,
        "peft_type=.* is not supported",
    ),
    Case(
        "adapter: init_lora_weights",
        evil("adapter", setting("adapter/adapter_config.json", init_lora_weights="evil")),
        imports("adapter"),
        load_both,
        "init_lora_weights=.* is not supported",
    ),
    Case("adapter: its base", other_base, torch_load("base/pytorch_model.bin"), merge_adapter, "pickled weights can run code"),
    Case("config: a tracker", evil(".", toml('[log]\ntrackers = ["evil"]\n')), imports("."), load_config, "trackers"),
    Case("config: an optimizer", evil(".", toml('[optim]\nkind = "evil"\n')), imports("."), load_config, "kind"),
    Case(
        "config: extends a program",
        evil(".", extends_a_program),
        imports("."),
        load_config,
        "evil.py:1",
    ),
]

# ----------------------------------------------------------------------------------------------------------------- text


def python_text(marker: Path) -> str:
    return f"__import__('os').system('touch {marker}')"


def say(text: str, path: str = "planted") -> None:
    """What the unsafe reader takes, as somebody would cut it out of the file."""
    Path(path).write_text(text, encoding="utf-8")


def evaluate() -> object:
    return eval(Path("planted").read_text())


def shell() -> object:
    return os.system(f"ls {Path('planted').read_text()} 2> {os.devnull}")


def in_config(line: str, text: Callable[[Path], str]) -> Callable[[Path], None]:
    """`line` of a config with TEXT in it."""

    def plant(marker: Path) -> None:
        say(text(marker))
        lines = Path("run.toml").read_text().split("\n")
        key = line.split(" = ")[0]
        replaced = [line.replace("TEXT", json.dumps(text(marker))) if old.startswith(f"{key} = ") else old for old in lines]
        if replaced == lines:
            replaced += line.replace("TEXT", json.dumps(text(marker))).split("\n")
        Path("run.toml").write_text("\n".join(replaced) + "\n")

    return plant


def in_data(make: Callable[[str], str], text: Callable[[Path], str]) -> Callable[[Path], None]:
    def plant(marker: Path) -> None:
        say(text(marker))
        Path("chats.jsonl").write_text(make(text(marker)) + "\n", encoding="utf-8")

    return plant


def chat_of(text: str, role: str = "user") -> str:
    return json.dumps({"messages": [{"role": role, "content": text}, {"role": "assistant", "content": text}]})


def as_target() -> None:
    apply_lora(build(Arch.from_folder("model")), load_config().lora)


def fetch_model() -> None:
    fetch(load_config().model.path)


def instantiate() -> None:
    """What Hydra and its like do with `_target_`."""
    module, _, name = "os.system".rpartition(".")
    getattr(importlib.import_module(module), name)(Path("planted").read_text())


def jsonpickle() -> None:
    """What jsonpickle does with py/reduce."""
    function, args = json.loads(Path("planted").read_text())["py/reduce"]
    module, _, name = function["py/function"].rpartition(".")
    getattr(importlib.import_module(module), name)(*args)


def yaml_config(marker: Path) -> None:
    Path("run.toml").write_text(f"!!python/object/apply:os.system ['touch {marker}']\n")


def literally() -> None:
    """Text of data that looks like a template is rendered as it is."""
    tokenize()
    text = Path("planted").read_text()
    assert text in Chat(Tokenizer.load("model")).render([{"role": "user", "content": text}])


def jinja_text(marker: Path) -> str:
    return ESCAPES["cycler"].replace("MARK", str(marker))


def touching(marker: Path) -> str:
    return f"$(touch {marker})"


TEXT = [
    Case("config: a path in a shell", in_config("path = TEXT", touching), shell, fetch_model, "no such folder"),
    Case("config: back quotes", in_config("path = TEXT", lambda m: f"`touch {m}`"), shell, fetch_model, "no such"),
    Case("config: a number", in_config("[train]\nsteps = TEXT", python_text), evaluate, load_config, "train.steps"),
    Case("config: a target", in_config("[lora]\ntargets = [TEXT]", python_text), evaluate, as_target, "matches no linear layer"),
    Case(
        "config: _target_",
        in_config('[train]\n_target_ = "os.system"\n_args_ = [TEXT]', lambda m: f"touch {m}"),
        instantiate,
        load_config,
        "train._target_",
    ),
    Case("config: YAML", yaml_config, lambda: yaml.unsafe_load(Path("run.toml").read_text()), load_config, "run.toml:1"),
    Case(
        "config: a template argument",
        in_config("[data.template_args]\nname = TEXT", jinja_text),
        lambda: plain_jinja(Path("planted").read_text()),
        load_config,
        None,
    ),
    Case("data: jinja", in_data(chat_of, jinja_text), lambda: plain_jinja(Path("planted").read_text()), literally, None),
    Case("data: Python", in_data(chat_of, python_text), evaluate, literally, None),
    Case("data: a shell", in_data(chat_of, touching), shell, literally, None),
    Case("data: a role", in_data(lambda t: chat_of("x", t), python_text), evaluate, tokenize, "chats.jsonl:1: .*role"),
    Case("data: not JSON", in_data(lambda t: f"{{'messages': {t}}}", python_text), evaluate, tokenize, "chats.jsonl:1: "),
    Case(
        "data: jsonpickle",
        in_data(lambda t: t, lambda m: json.dumps({"py/reduce": [{"py/function": "os.system"}, [f"touch {m}"]]})),
        jsonpickle,
        tokenize,
        "chats.jsonl:1: .*messages",
    ),
]

CASES = [*PICKLES, *TEMPLATES, *NAMES, *TEXT]


def test_there_are_enough_of_each():
    assert len({case.name for case in CASES}) == len(CASES)
    assert [len(kind) >= least for kind, least in ((PICKLES, 35), (TEMPLATES, 25), (NAMES, 20), (TEXT, 10))] == [True] * 4
    assert TEMPLATE not in ESCAPES.values()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_does_not_run(place, case, capfd):
    marker = place / "ran"
    case.plant(marker)
    assert not marker.exists(), "planting it must not run it"
    if case.says is None:
        case.use()
    else:
        with pytest.raises(UserError, match=case.says) as caught:
            case.use()
        assert "\n" not in str(caught.value)
    assert not marker.exists() and "evil" not in sys.modules
    assert "Traceback" not in capfd.readouterr().err
    with contextlib.suppress(Exception):  # it has run by then, or the marker says that it has not
        case.unsafe()
    assert marker.exists(), "the payload is not live"
