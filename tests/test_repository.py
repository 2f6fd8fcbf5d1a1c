"""Rules about the code itself: floors of imports, file sizes, ladders of names, docstrings, lint, types."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import mwpb_kernels
import pytest
import torch
from floors import FLOOR, imports, parsed, room_of

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for folder in ("kernels", "mwpb_fast", "bench", "docs", "examples", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h") and not {"__pycache__", "build"} & set(path.parts)
)
PYTHON = [p for p in SOURCES if p.suffix == ".py"]
TRAINER = [p for p in PYTHON if p.is_relative_to(ROOT / "mwpb_fast")]
KERNELS = [p for p in PYTHON if p.is_relative_to(ROOT / "kernels" / "mwpb_kernels")]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_file_is_too_long() -> None:
    long = {relative(p): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 300}
    assert not long


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    for name, line in imports(path):
        top = name.split(".")[0]
        allowed = {"torch", "mwpb_kernels"} | sys.stdlib_module_names
        if path.name == "late.py":  # the one place where Triton's absence is handled
            allowed |= {"triton"}
        assert top in allowed, f"{relative(path)}:{line} imports {name}"


@pytest.mark.parametrize("path", TRAINER, ids=lambda p: str(p.relative_to(ROOT / "mwpb_fast")))
def test_trainer_imports_downwards(path: Path) -> None:
    mine = room_of(path)
    assert mine in FLOOR, f"{relative(path)} stands on no floor; give {mine!r} one in docs/floors.py"
    for name, line in imports(path):
        top, *rest = name.split(".")
        assert top not in ("bench", "tests"), f"{relative(path)}:{line}"
        if top != "mwpb_fast" or not rest or rest[0] == mine:
            continue
        assert rest[0] in FLOOR, f"{relative(path)}:{line} imports {name}, which stands on no floor"
        assert FLOOR[rest[0]] < FLOOR[mine], f"{relative(path)}:{line} imports {name}, which is not below it"


@pytest.mark.parametrize(
    "path",
    [p for p in TRAINER if p.parent.name in ("budgets", "attacks", "objectives", "perturbations")],
    ids=lambda p: str(p.relative_to(ROOT / "mwpb_fast")),
)
def test_an_axis_imports_nothing_heavy(path: Path) -> None:
    """Its options are read before that is there; what TYPE_CHECKING or a function holds is not run then."""
    run = {node.lineno for node in parsed(path).body}
    for name, line in imports(path):
        heavy = line in run and name.split(".")[0] in ("torch", "mwpb_kernels", "numpy")
        assert not heavy, f"{relative(path)}:{line} imports {name}: take it from mwpb_fast.system.lazy"


def test_the_floors_picture_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "floors.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_step_imports_no_axis() -> None:
    """The step is handed its budget, attack and objective; it knows none of them."""
    for name, line in imports(ROOT / "mwpb_fast" / "step.py"):
        for axis in ("budgets", "attacks", "objectives", "perturbations", "data", "recipes"):
            assert not name.startswith(f"mwpb_fast.{axis}"), f"step.py:{line} imports {name}"


def method_names() -> set[str]:
    """The names on the axes, which are their files' names, and those of the recipes."""
    axes = ("budgets", "attacks", "objectives", "perturbations", "recipes")
    stems = {p.stem for a in axes for p in (ROOT / "mwpb_fast" / a).glob("*.py") if not p.stem.startswith("_")}
    return stems - {"none"} | {"mwpb", "mwpb_at", "mwpb_trades", "mwpb_mart", "awp", "cw"}


def strings(node: ast.AST) -> set[str]:
    return {n.value.lower() for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


@pytest.mark.parametrize(
    "path",
    [p for p in TRAINER if "recipes" not in p.parts],
    ids=lambda p: str(p.relative_to(ROOT / "mwpb_fast")),
)
def test_no_branch_on_a_methods_name(path: Path) -> None:
    """Comparisons, matches and dispatch by startswith on 'trades', 'pgd', ...: the axes make them needless."""
    names = method_names()
    for node in ast.walk(parsed(path)):
        found: set[str] = set()
        if isinstance(node, ast.Compare):
            found = strings(node)
        elif isinstance(node, ast.match_case):
            found = strings(node.pattern)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".startswith"):
            found = {s for a in node.args for s in strings(a)}
        line = getattr(node, "lineno", getattr(getattr(node, "pattern", None), "lineno", 0))
        assert not found & names, f"{relative(path)}:{line} branches on {found & names}"


@pytest.mark.parametrize("path", [p for p in PYTHON if "tests" not in p.parts], ids=relative)
def test_files_of_text_have_an_encoding_and_files_of_json_are_strict(path: Path) -> None:
    """Without an encoding it is the locale's, and what one machine wrote another cannot read. Files get their JSON
    from `to_json`; what json.dumps makes is hashed, or handed to a helper process."""
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call):
            continue
        where = f"{relative(path)}:{node.lineno}"
        called = ast.unparse(node.func)
        name = called.rpartition(".")[2]
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        binary = any("b" in text for a in node.args for text in strings(a) if len(text) < 4)
        opened = name in ("open", "fdopen") and called not in ("os.open", "tarfile.open", "Image.open")
        text = name in ("read_text", "write_text") or given.get("text") == "True"
        assert not ((opened and not binary) or text) or "encoding" in given, f"{where}: no encoding"
        strict = called != "json.dump" and not (name == "write_atomically" and "json.dumps" in ast.unparse(node))
        assert strict, f"{where}: take to_json"


def test_one_stem_for_an_op_and_its_native_code() -> None:
    python = {p.stem for p in KERNELS}
    for path in (ROOT / "kernels" / "csrc").glob("*.cpp"):
        assert path.stem in python, f"{relative(path)} has no {path.stem}.py"


PUBLIC = [n for n in mwpb_kernels.__all__ if inspect.isfunction(getattr(mwpb_kernels, n))]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_name_shapes(name: str) -> None:
    """Types on everything; a docstring that names every tensor argument, and shapes where there are tensors."""
    function = getattr(mwpb_kernels, name)
    document = inspect.getdoc(function)
    assert document, "no docstring"
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name
    referred = re.search(r"as `(\w+)`(?: takes them)?", document)
    if referred and hasattr(mwpb_kernels, referred[1]):
        document += inspect.getdoc(getattr(mwpb_kernels, referred[1])) or ""
    taken = [p.name for p in signature.parameters.values() if "Tensor" in str(p.annotation)]
    for parameter in taken:
        assert re.search(rf"\b{parameter}\b", document), f"{parameter} is not described"
    if taken:
        assert re.search(r"\(([BCNK]|\.\.\.)[,)]|\blists?\b|\bany shape\b|one-element", document), "no shapes"


def test_all_is_sorted_and_complete() -> None:
    assert list(mwpb_kernels.__all__) == sorted(mwpb_kernels.__all__)
    assert all(hasattr(mwpb_kernels, n) for n in mwpb_kernels.__all__)


def test_lock_files_hold_versions_and_nothing_else() -> None:
    """Exact pins and comments: no host, no credential, no local path, and no build of torch that needs one."""
    locks = sorted((ROOT / "requirements").glob("*.lock"))
    assert locks
    pinned = re.compile(r"[a-z0-9][a-z0-9._-]*(\[[a-z0-9,]+\])?==[0-9][a-z0-9.+!]*( ;.*| --hash=sha256:\w{64})*")
    for lock in locks:
        for line in lock.read_text().splitlines():
            line = line.strip()
            if line and not line.startswith("#") and not re.fullmatch(r"-r [a-z]+\.lock", line):
                assert pinned.fullmatch(line.rstrip(" \\")), f"{relative(lock)}: {line}"


def test_no_file_names_a_host_or_a_secret() -> None:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    patterns = (
        r"--(extra-)?index-url",
        r"--trusted-host",
        r"-----BEGIN [A-Z ]*PRIVATE KEY",
        r"\b(ghp|gho|hf|sk)_[A-Za-z0-9]{20,}",
        r"\bAKIA[0-9A-Z]{16}\b",
        r"://[^/\s:@]+:[^/\s:@]+@",
        r"\b(10|192\.168|172\.(1[6-9]|2\d|3[01]))(\.\d{1,3}){2,3}:\d+",
    )
    for name in done.stdout.splitlines():
        path = ROOT / name
        if path == Path(__file__) or not path.is_file() or path.stat().st_size > 2**20:
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for pattern in patterns:
            assert not re.search(pattern, text), f"{name} holds {pattern}"


def fresh(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_command_line_is_light() -> None:
    """A bad option is refused before anything heavy is imported, so neither may the command line import it; help
    needs nothing but Python's own modules."""
    code = "import sys; before = set(sys.modules); import mwpb_fast.cli as c; c.main(['--help']); "
    *_, modules = fresh(code + "print(*{m.split('.')[0] for m in set(sys.modules) - before})").splitlines()
    assert set(modules.split()) - sys.stdlib_module_names == {"mwpb_fast"}


def test_kernels_import_without_the_trainer() -> None:
    out = fresh("import sys, mwpb_kernels; print(*{m.split('.')[0] for m in sys.modules})")
    assert "mwpb_fast" not in out.split()


@pytest.mark.parametrize(
    "tool",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=["ruff", "ruff-format", "mypy"],
)
def test_lint_and_types(tool: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


def test_torch_is_new_enough_for_the_stable_abi() -> None:
    assert tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 11)
