"""Every kernel compiles for sm_90 and keeps what it works with in registers; no GPU is needed (tests/kernels/compiled.py)."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.launch import triton

ROOT = Path(__file__).resolve().parent.parent.parent
SHARED = 227 * 1024  # bytes that a program may have on sm_90

pytestmark = pytest.mark.skipif(triton is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    environ = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    ran = subprocess.run([sys.executable, "-m", "tests.kernels.compiled"], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_every_kernel_is_among_them(compiled):
    """All functions under `@jit` in kernels/ that a launcher starts, that is all whose names end in `_kernel`."""
    names = set()
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") == "jit" for d in node.decorator_list):
                names.add(node.name)
    assert {name for name in names if name.endswith("_kernel")} == {each["kernel"] for each in compiled}


def test_nothing_spills(compiled):
    assert compiled and not [each for each in compiled if each["spilled"]]


def test_programs_fit_on_a_multiprocessor(compiled):
    for each in compiled:
        assert each["shared"] <= SHARED and each["registers"] * each["warps"] * 32 <= 65536, each
