"""The house stays what it is: who may import whom, no free unpickling, light packages. Read from the syntax trees."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"kernels", "model", "parallel", "objective", "data", "optim", "runtime", "tools", "train", "tests", "benchmarks"}
ALLOWED = {
    "kernels": set(),
    "optim": {"kernels"},
    "data": {"runtime.hub"},
    "runtime": set(),
    "model": {"kernels", "runtime.hub"},
    "parallel": {"model", "kernels", "data.batch"},
    "objective": {"model", "kernels", "data.batch"},
}
LEAVES = ("runtime.errors", "runtime.files")  # of the standard library alone, for everybody
SOURCES = sorted(p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] in OURS | {"train.py"})


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """Every module a file imports, wherever in the file: (line, dotted name)."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who imports whom"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def violations(package: str, text: str) -> list[str]:
    bad = []
    for line, name in imported(ast.parse(text)):
        top = name.split(".")[0]
        legal = top not in OURS or top == package or name.startswith(LEAVES)
        if not legal and not any(name == ok or name.startswith(ok + ".") for ok in ALLOWED[package]):
            bad.append(f"line {line}: {name}")
    return bad


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package):
    files = [p for p in SOURCES if p.relative_to(ROOT).parts[0] == package]
    assert files
    found = {str(p.relative_to(ROOT)): bad for p in files if (bad := violations(package, p.read_text(encoding="utf-8")))}
    assert not found


def test_leaves_stand_on_the_standard_library():
    for leaf in LEAVES:
        names = {name for _, name in imported(ast.parse((ROOT / f"{leaf.replace('.', '/')}.py").read_text(encoding="utf-8")))}
        foreign = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names and not name.startswith(LEAVES)}
        assert names and not foreign


def test_the_rule_sees_imports_inside_functions():
    assert violations("model", "def f():\n    from parallel.mesh import Mesh") == ["line 2: parallel.mesh.Mesh"]
    assert violations("parallel", "from data.stream import Stream") == ["line 1: data.stream.Stream"]
    assert not violations("parallel", "from data.batch import Batch\nfrom runtime.errors import UserError")


def test_nothing_of_the_product_imports_the_reference_libraries():
    heavy = {"transformers", "peft", "accelerate", "datasets", "deepspeed", "bitsandbytes", "flash_attn", "trl", "liger_kernel"}
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] not in ("tests", "benchmarks"):
            names = {name.split(".")[0] for _, name in imported(ast.parse(path.read_text(encoding="utf-8")))}
            assert not names & heavy, path


MODULES = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "imp", "code", "codeop", "torch.package"}
CALLABLES = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__"),
    *("importlib.import_module", "importlib.reload", "importlib.__import__", "importlib.util.spec_from_file_location"),
    *("os.system", "os.popen", "os.startfile", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"),
    *(
        "torch.jit.load",
        "torch.hub.load",
        "torch.export.load",
        "torch.distributed.checkpoint.load",
        "torch.distributed.checkpoint.load_state_dict",
    ),
    *("pandas.read_pickle", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "numpy.loads"),
}
ENDINGS = re.compile(
    r"(^|\.)(Unpickler|exec_module|load_module|(isend|irecv|send|recv|broadcast|all_gather|gather|scatter)_object(_list)?|os\.(exec|spawn|posix_spawn)\w*)$"
)
LEGAL = {  # what a file may use of it, and why
    "runtime/checkpoint/shards.py": {"pickle", "pickle.Unpickler"},  # its unpickler knows a few names
    "model/families/__init__.py": {"importlib.import_module"},  # of our own modules, by a name from a table
    "data/formats/__init__.py": {"importlib.import_module"},  # by a name that the config's type allows
    "runtime/checkpoint/__init__.py": {"importlib.import_module"},  # by a name from a table
}


def aliases(tree: ast.AST) -> dict[str, str]:
    """What names stand for by import or by plain assignment, wherever in the file: name -> dotted name."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0] for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and (name := dotted(node.value, found)):
            found |= {target.id: name for target in node.targets if isinstance(target, ast.Name) and target.id not in found}
    return found


def dotted(node: ast.AST, known: dict[str, str]) -> str | None:
    """The dotted name an expression is, with aliases resolved; None if it is no such thing."""
    if isinstance(node, ast.Name):
        return known.get(node.id, "?" if node.id in MODULES else node.id)  # not imported: a variable of that name
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, known) or '?'}.{node.attr}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1:
        name = node.args[1]
        return f"{dotted(node.args[0], known) or '?'}.{name.value}" if isinstance(name, ast.Constant) else None
    return None


def forbidden(name: str) -> bool:
    return name in CALLABLES or bool(ENDINGS.search(name)) or any(name == m or name.startswith(f"{m}.") for m in MODULES)


def unsafe_call(name: str, node: ast.Call) -> bool:
    """Whether it is by its arguments that a call is unsafe."""
    given = {k.arg: getattr(k.value, "value", ...) for k in node.keywords}
    if name == "torch.load":
        return given.get("weights_only") is not True or bool(given.keys() & {"pickle_module", None})
    if name == "numpy.load":
        return given.get("allow_pickle", False) is not False or None in given or len(node.args) > 2
    if name.startswith("subprocess."):
        return given.get("shell", False) is not False or None in given
    return False


def unsafe(text: str) -> list[tuple[int, str]]:
    """What unpickles freely, runs text as code or as a command, or sends objects through collectives: (line, dotted name).

    Every mention counts, called or not. Found by names, so not what hides them: it is there to catch oversight, not intent.
    """
    tree = ast.parse(text)
    known = aliases(tree)
    found = [(line, name) for line, name in imported(tree) if forbidden(name) or name.endswith(".*")]
    arguments = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := dotted(node.func, known)) and unsafe_call(name, node):
            found.append((node.lineno, name))
        if not isinstance(node, (ast.Name, ast.Attribute, ast.Call)) or not (name := dotted(node, known)):
            continue
        if isinstance(getattr(node, "ctx", None), ast.Store):  # a field that is called so
            continue
        if forbidden(name) or (name in ("torch.load", "numpy.load") and id(node) not in arguments):  # under another name, arguments unseen
            found.append((node.lineno, name))
    return found


def test_no_free_unpickling_and_no_code_from_text():
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if name.split("/")[0] not in ("tests", "benchmarks"):
            found = unsafe(path.read_text(encoding="utf-8"))
            assert {what for _, what in found} == LEGAL.get(name, set()), (name, found)


UNSAFE = """
from pickle import loads
import pickle as p; p.loads(b)
import pickle; pickle.Unpickler(f).load()
from torch import load; load(f)
import torch; load = torch.load; load(f, weights_only=True)
import torch; torch.load(f)
import torch; torch.load(f, weights_only=False)
import torch; torch.load(f, weights_only=flag)
import torch; torch.load(f, weights_only=True, pickle_module=evil)
import torch; torch.load(f, weights_only=True, **more)
import torch as t; getattr(t, "load")(f)
import torch; torch.jit.load(f)
import torch.jit as j; j.load(f)
from torch import jit; jit.load(f)
import marshal; marshal.loads(b)
import joblib; joblib.load(f)
import numpy as np; np.load(f, allow_pickle=True)
import numpy as np; np.load(f, None, True)
from numpy import load; load(f, allow_pickle=x)
import torch.distributed.checkpoint as dcp; dcp.load(d, checkpoint_id=p)
from torch.distributed.checkpoint import load; load(d)
dist.send_object_list(x)
dist.recv_object_list(x)
dist.broadcast_object_list(x)
dist.all_gather_object(x, y)
dist.gather_object(x)
dist.scatter_object_list(x, y)
from torch.distributed import all_gather_object
__import__(name)
import importlib; importlib.import_module(name)
from importlib import import_module as get; get(name)
import importlib.util as u; u.spec_from_file_location(a, b)
spec.loader.exec_module(m)
import os; os.system(x)
from os import system
import os; os.popen(x)
import os; os.execv(a, b)
compile(x, "", "exec")
eval(x)
exec(x)
run = exec
import builtins; builtins.eval(x)
import subprocess; subprocess.run(x, shell=True)
from subprocess import Popen; Popen(x, shell=flag)
import subprocess; subprocess.getoutput(x)
import pandas as pd; pd.read_pickle(f)
import yaml; yaml.load(f)
from os import *
""".strip().splitlines()


@pytest.mark.parametrize("text", UNSAFE)
def test_what_is_unsafe_is_found(text):
    assert unsafe(text)
    indented = "\n".join(f"    {line}" for line in text.split("; "))
    if "*" not in text.split("; ")[0]:
        assert unsafe(f"def f():\n{indented}")


def test_what_is_safe_is_not():
    safe = """
import re, subprocess, torch, numpy as np, importlib.util, yaml
torch.load(f, weights_only=True)
net.eval(); torch.compile(net); re.compile(x); model.load(f); np.load(f); np.load(f, allow_pickle=False)
subprocess.run([a]); subprocess.run([a], shell=False); importlib.util.find_spec(x); json.loads(x); yaml.safe_load(x); x.exec; object_list()
"""
    assert unsafe(safe) == []


def test_help_needs_no_torch_and_no_time():
    code = (
        "import sys, time; t = time.perf_counter(); import train; sys.exit('torch' in sys.modules or 2 * (time.perf_counter() - t > 1.0))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
