"""Imports where something is missing or set otherwise, each in a fresh interpreter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mwpb_kernels
import pytest

PACKAGE = Path(mwpb_kernels.__file__).parent


def python(code: str, *path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, `path` first on its module path."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MWPB_", "TRITON_"))}
    env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    return subprocess.run(
        [sys.executable, "-c", code], env={**env, **environment}, capture_output=True, text=True, timeout=120
    )


USE = """
import torch, mwpb_kernels as k
z = torch.tensor([[2., 1., 0.]], requires_grad=True)
y = torch.tensor([0])
k.margin(z, y).backward(torch.ones(1))
print(k.implementation('margin'), k.native_library, k.implementation('margin', 'cuda'),
      round(k.margin_radius(z, y, 8 / 255, 0.58).item(), 7), round(z.grad[0, 0].item(), 6))
"""
# Of p = softmax(2, 1, 0) = (.66524096, .24472847, .09003057), in float64: exp(.58 * .42051249) * 8/255, and the
# gradient .66524096 * (1 - .42051249).
VALUES = ["0.0400381", "0.385499"]


def used(*path: Path, prelude: str = "", **environment: str) -> tuple[list[str], str]:
    done = python(prelude + USE, *path, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


def test_environment_forces_the_reference() -> None:
    out, _ = used(PACKAGE.parent, MWPB_IMPL="reference")
    assert [out[0], out[2], *out[3:]] == ["reference", "reference", *VALUES]


def test_environment_refuses_other_names() -> None:
    done = python("import mwpb_kernels", PACKAGE.parent, MWPB_IMPL="fast")
    assert done.returncode != 0
    assert "MWPB_IMPL='fast': the only value is 'reference'" in done.stderr.splitlines()[-1]


BROKEN_TRITON = """
import os, sys, torch
KINDS = [TypeError("a\\nb"), ImportError("c"), SystemExit(3), AttributeError("d"), OSError("e"), None]
class Break:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'triton':
            raise kind or ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Break())
for kind in KINDS:
    if (child := os.fork()) == 0:
        import mwpb_kernels as k
        on = [k.implementation('margin', device) for device in ('cuda', 'cpu')]
        torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # asks for Triton as well
        print(k.triton_problem, *on, sep='; ', flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, kind
"""


def test_works_with_a_broken_triton() -> None:
    done = python(BROKEN_TRITON, PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    cpu = mwpb_kernels.implementation("margin")
    told = ["TypeError: a b", "ImportError: c", "SystemExit: 3", "AttributeError: d", "OSError: e"]
    expected = [f"Triton does not import ({what}); reference; {cpu}" for what in told]
    assert done.stdout.splitlines() == [*expected, f"Triton is not installed; reference; {cpu}"]


def test_an_empty_variable_is_as_unset() -> None:
    assert used(PACKAGE.parent, MWPB_IMPL="") == used(PACKAGE.parent)


def test_works_without_triton() -> None:
    block = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'triton':
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Block())
"""
    out, _ = used(PACKAGE.parent, prelude=block)
    assert [out[2], *out[3:]] == ["reference", *VALUES]


def copied(folder: Path, *left_out: str) -> Path:
    """A copy of the package in `folder`, without its libraries and what is named."""
    ignored = shutil.ignore_patterns("*.so", "no_native.txt", "__pycache__", *left_out)
    shutil.copytree(PACKAGE, folder / "mwpb_kernels", ignore=ignored)
    return folder / "mwpb_kernels"


def slow(tmp_path: Path, **environment: str) -> str:
    """What the ops of a package without a library that loads say, having done their work."""
    out, errors = used(tmp_path, **environment)
    assert out == ["reference", "None", "reference" if "MWPB_IMPL" in environment else "triton", *VALUES]
    assert "Warning" not in errors
    return errors


def test_works_without_the_native_library(tmp_path: Path) -> None:
    """And says so once: at the first op, not before, whatever warnings are turned into."""
    copied(tmp_path)
    (line,) = slow(tmp_path, PYTHONWARNINGS="error").splitlines()
    assert line.startswith("mwpb_kernels: CPU ops use the slower reference: nothing was built in ")
    assert python("import mwpb_kernels", tmp_path).stderr == ""
    for hidden in ({"MWPB_QUIET": "1"}, {"MWPB_IMPL": "reference"}):
        assert slow(tmp_path, **hidden) == ""


def test_no_library_says_the_cause_that_the_installation_left(tmp_path: Path) -> None:
    (copied(tmp_path) / "no_native.txt").write_text("CMake was not found\n")
    assert "slower reference: CMake was not found (`mwpb-fast doctor`" in slow(tmp_path)


def test_library_for_another_processor_level_is_named(tmp_path: Path) -> None:
    (copied(tmp_path) / "libmwpb_other.so").write_bytes(b"")
    assert "is not there, only libmwpb_other.so: built for another processor" in slow(tmp_path)


def test_broken_native_library_is_a_warning(tmp_path: Path) -> None:
    package = copied(tmp_path)
    for level in ("baseline", "avx2", "avx512"):
        (package / f"libmwpb_{level}.so").write_bytes(b"not a library")
    (line,) = slow(tmp_path).splitlines()
    assert "CPU ops use the slower reference" in line
    assert "does not load; it was built against another PyTorch, or elsewhere (" in line
    assert "libmwpb_" in line.partition("elsewhere (")[2]  # the loader's own words


@pytest.mark.skipif(not Path(sys.executable).read_bytes().startswith(b"\x7fELF"), reason="no ELF platform")
def test_library_for_another_machine_is_named(tmp_path: Path) -> None:
    head = bytearray(Path(sys.executable).read_bytes()[:64])
    head[18] ^= 0xFF  # e_machine
    package = copied(tmp_path)
    for level in ("baseline", "avx2", "avx512"):
        (package / f"libmwpb_{level}.so").write_bytes(bytes(head))
    assert "is not for this processor: built for another processor" in slow(tmp_path)


@pytest.mark.skipif(mwpb_kernels.native_library is None, reason="no native library is built")
@pytest.mark.parametrize("level", ["default", "avx2"])
def test_every_processor_level_loads(level: str) -> None:
    out, _ = used(PACKAGE.parent, ATEN_CPU_CAPABILITY=level)
    assert out == ["native", f"libmwpb_{'baseline' if level == 'default' else level}.so", "triton", *VALUES]


def test_import_needs_torch_only_and_is_quick() -> None:
    code = """
import sys, time, torch
before = set(sys.modules)
start = time.process_time()
import mwpb_kernels
print(time.process_time() - start)
names = {m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names
print(*sorted(n for n in names if not n.startswith('_')))
"""
    done = python(code, PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    seconds, modules = done.stdout.splitlines()
    # numpy, sympy and mpmath: what torch itself may load late; Triton waits for the first op on CUDA
    assert set(modules.split()) <= {"mwpb_kernels", "torch", "numpy", "sympy", "mpmath"}
    assert float(seconds) < 10.0
