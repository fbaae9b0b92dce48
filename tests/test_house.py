"""The house stays what it is: who may import whom, no free unpickling, light packages. Read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"kernels", "model", "parallel", "objective", "data", "optim", "runtime", "tools", "train", "tests", "benchmarks"}
ALLOWED = {
    "kernels": set(),
    "optim": {"kernels"},
    "data": set(),
    "runtime": set(),
    "model": {"kernels"},
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


FORBIDDEN = {
    "pickle.load",
    "pickle.loads",
    "eval",
    "exec",
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
}


def unsafe_calls(text: str) -> list[str]:
    """Calls that unpickle freely, run text as code, or send objects through collectives."""
    bad = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in FORBIDDEN or name.split(".")[-1] in FORBIDDEN - {"eval", "exec"}:
            bad.append(f"line {node.lineno}: {name}")
        if name == "torch.load" and not any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords):
            bad.append(f"line {node.lineno}: torch.load without weights_only=True")
    return bad


def test_no_free_unpickling_and_no_code_from_text():
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] not in ("tests", "benchmarks"):
            assert not unsafe_calls(path.read_text(encoding="utf-8")), path
    assert unsafe_calls("import torch\ntorch.load('x')\ndist.broadcast_object_list(x)\nexec('1')")
    assert not unsafe_calls("torch.load(f, weights_only=True)\nnet.eval()")


def test_help_needs_no_torch_and_no_time():
    code = (
        "import sys, time; t = time.perf_counter(); import train; sys.exit('torch' in sys.modules or 2 * (time.perf_counter() - t > 1.0))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
