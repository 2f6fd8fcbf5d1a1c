"""Every Triton kernel compiled for sm_80, sm_90 and sm_100 without a GPU: registers, spills, offsets."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mwpb_kernels
import pytest
from cases import NAMES, OPS

pytest.importorskip("triton")
PACKAGE = Path(mwpb_kernels.__file__).parent
SCRIPT = Path(__file__).with_name("ahead_of_time.py")
PROCESSES = 2


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the compiler reports of every entry, compiled afresh in processes that have no interpreter."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = str(PACKAGE.parent)
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(part), str(PROCESSES)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in range(PROCESSES)
    ]
    done = [(process.communicate(timeout=500), process.returncode) for process in running]
    for (_, errors), code in done:
        assert code == 0, errors
    return [json.loads(line) for (out, _), _ in done for line in out.splitlines()]


def kernels() -> dict[str, Path]:
    """The Triton kernels in the package: functions under @triton.jit whose name ends in _kernel."""
    found = {}
    for path in sorted(PACKAGE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                decorators = [ast.unparse(d) for d in node.decorator_list]
                assert any(d.startswith("triton.jit") for d in decorators), f"{path.name}: {node.name}"
                assert node.name not in found, f"two kernels named {node.name}"
                found[node.name] = path
    return found


def test_every_kernel_is_compiled_for_every_architecture(compiled: list[dict[str, Any]]) -> None:
    assert {r["arch"] for r in compiled} == {80, 90, 100}
    for arch in (80, 90, 100):
        assert {r["kernel"] for r in compiled if r["arch"] == arch} == set(kernels())


@pytest.mark.parametrize("name", NAMES)
def test_no_spills_and_few_registers(name: str, compiled: list[dict[str, Any]]) -> None:
    mine = [r for r in compiled if r["op"] == name]
    assert len(mine) == 3 * len(OPS[name].compiles) > 0
    for r in mine:
        assert r["spilled"] == 0, r
        assert 0 < r["registers"] <= r["limit"], r


@pytest.mark.parametrize("name", NAMES)
def test_addresses_are_made_in_64_bits(name: str, compiled: list[dict[str, Any]]) -> None:
    """No product of a stride or a program's number in 32 bits on the way to an address, as Triton sees it."""
    for r in compiled:
        if r["op"] == name:
            assert not r.get("narrow"), (r["kernel"], r["narrow"])


@pytest.mark.parametrize("name", NAMES)
def test_every_integer_may_be_one(name: str, compiled: list[dict[str, Any]]) -> None:
    """A launch makes a constant of an integer that is 1, which the interpreter never does."""
    mine = [r for r in compiled if r["op"] == name and "ones" in r]
    assert len(mine) == len(OPS[name].compiles)
    for r in mine:
        assert not r["ones"], (r["kernel"], r["ones"])


@pytest.mark.parametrize("kernel", sorted(kernels()))
def test_program_numbers_are_widened_at_once(kernel: str) -> None:
    """tl.program_id(...).to(tl.int64), so that no product of it can wrap, in the source of every kernel.

    A quotient or remainder of it by a count of pieces is as good, if that is widened.
    """
    path = kernels()[kernel]
    function = next(
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.name == kernel
    )
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.program_id":
            above = parents[node]
            if isinstance(above, ast.BinOp) and isinstance(above.op, ast.Mod):
                continue
            if isinstance(above, ast.BinOp) and isinstance(above.op, ast.FloorDiv):
                above = parents[above]
            assert isinstance(above, ast.Attribute), f"{path.name}:{node.lineno}"
            assert ast.unparse(parents[above]).endswith(".to(tl.int64)"), f"{path.name}:{node.lineno}"
