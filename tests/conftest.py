"""What every test shares: Triton's interpreter where there is no GPU, seeds, marks, poison, the real data."""

from __future__ import annotations

import importlib
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mwpb_fast.system import threads

# Of several processes that run the suite together each takes its share of the cores.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads.available()[0] // int(workers))))
threads.prepare()  # reads nothing of PyTorch, which must not have been imported yet

import torch  # noqa: E402

# Before anything imports Triton, which reads the variable once. With a GPU the real kernels are tested, unless
# the interpreter is asked for by setting the variable.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    # Children inherit what is ignored, and the trainer then ignores it too: SIGINT is where a shell has put the
    # suite in the background, SIGHUP under nohup.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    config.addinivalue_line("markers", "unpoisoned: op tests for which filling new memory with NaN costs too much")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: the cores that may be used, and no more processes than memory is likely to hold."""
    return min(threads.available()[0], 8)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked slow run when asked for: by `-m slow` (or any -m), or by naming one with `::`."""
    if not config.option.markexpr and not any("::" in a for a in config.args):
        slow = [item for item in items if "slow" in item.keywords]
        items[:] = [item for item in items if "slow" not in item.keywords]
        config.hook.pytest_deselected(items=slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _openmp_waits() -> Iterator[None]:
    """The suite is as quick beside other programs as the trainer."""
    with threads.adaptive_openmp_waits():
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the choices of engines that the user's own runs keep."""
    monkeypatch.setenv("MWPB_CACHE", str(tmp_path_factory.getbasetemp() / "no-cache"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Each test starts from the same state of every generator, so its order among others does not matter."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real images: MWPB_SHARED_DATA, else shared/data beside the checkout; skips where absent."""
    path = Path(os.environ.get("MWPB_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no folder {path}; MWPB_SHARED_DATA names it")
    return path


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor holds NaN (the largest value for integers) during the test.

    The filling happens inside PyTorch's allocation functions, so it also reaches what native ops allocate
    through the stable ABI (new_empty, empty_like): whatever an op does not write shows up as NaN.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """bench("name") is that module of the bench folder."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))

    return importlib.import_module
