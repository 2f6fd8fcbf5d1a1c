"""What others' code brings along: images of half types, torch.export, Python threads, workers of data loaders."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mwpb_kernels as ops
import pytest
import torch
from cases import NAMES, OPS, exact_copy, samples, strides, tensors
from test_dispatch import public_call

HALVES = [torch.bfloat16, torch.float16]
KEY = torch.tensor([3])
FEW = ("margin", "linf_step_", "awp_perturb_")  # a derivative, a write, lists
PUBLIC = [n for n in NAMES if public_call(OPS[n])]


# images of half types ----------------------------------------------------------------------------------------
def start(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: getattr(ops, name)(x, 0.03, KEY, torch.arange(len(x)))


def step(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    size = {"linf_step_": 0.03, "l2_step_": 0.5}[name]

    def stepped(x: torch.Tensor) -> torch.Tensor:
        x_adv = start("uniform_start")(x)
        gradient = start("gaussian_start")(x.float()) - 0.5
        return getattr(ops, name)(x_adv, gradient.to(x.dtype), x, size, size / 4)

    return stepped


TAKE_IMAGES = [start(n) for n in ("gaussian_start", "uniform_start", "l2_start")]
TAKE_IMAGES += [step(n) for n in ("linf_step_", "l2_step_")]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("forced", [False, True], ids=["fastest", "reference"])
@pytest.mark.parametrize("moved", TAKE_IMAGES)
def test_images_of_half_types(moved: Callable[[torch.Tensor], torch.Tensor], forced: bool, dtype: Any) -> None:
    """Attacked in float32, from what the half images stand for exactly, in their layout; they stay as they are."""
    x = torch.rand(3, 3, 5, 7).to(dtype, memory_format=torch.channels_last)
    before = x.clone()
    with ops.force_reference(forced):
        x_adv = moved(x)
        if "step" not in moved.__qualname__:
            assert torch.equal(x_adv, moved(x.float()))
    assert (x_adv.dtype, strides(x_adv)) == (torch.float32, strides(x))
    assert torch.equal(x, before)
    assert 0 < (x_adv - x.float()).abs().max() <= 0.5


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("forced", [False, True], ids=["fastest", "reference"])
def test_a_step_beside_half_images_is_that_beside_float32(forced: bool, dtype: Any) -> None:
    x = torch.rand(3, 3, 5, 7).to(dtype)
    gradient, radius = torch.randn(x.shape).to(dtype), torch.tensor([0.01, 0.02, 0.03])
    with ops.force_reference(forced):
        for op, size in ((ops.linf_step_, 1.0), (ops.l2_step_, 20.0)):
            one, other = x.float(), x.float()
            for _ in range(3):
                op(one, gradient, x, size * radius, size * radius / 2)
                op(other, gradient, x.float(), size * radius, size * radius / 2)
            assert torch.equal(one, other)
            assert not torch.equal(one, x.float())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_attack_in_a_pipeline_of_a_half_type(dtype: torch.dtype) -> None:
    """Images, model and gradients of a half type, as fast CIFAR pipelines hold them; the attack keeps the ball."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (8, 3, 8, 8), generator=generator, dtype=torch.uint8)
    x, y = ops.crop_flip(images, torch.arange(8), KEY, pad=1, dtype=dtype), torch.arange(8)
    weight = (torch.randn(10, 192, generator=generator) / 4).to(dtype)

    def logits_of(values: torch.Tensor) -> torch.Tensor:
        return values.to(dtype).flatten(1) @ weight.t()

    radius = ops.margin_radius(logits_of(x), y, 8 / 255, 0.58)
    x_adv = ops.gaussian_start(x, 0.001, KEY, torch.arange(8))
    assert (radius.dtype, x_adv.dtype) == (torch.float32, torch.float32)
    for _ in range(5):
        leaf = x_adv.to(dtype).requires_grad_()
        logits = logits_of(leaf)
        (gradient,) = torch.autograd.grad(logits, leaf, ops.ce_grad(logits.detach(), y))
        ops.linf_step_(x_adv, gradient, x, radius, radius / 4)
    assert ((x_adv - x.float()).abs().flatten(1).amax(1) <= radius + 1e-6).all()
    assert (ops.margin(logits_of(x_adv), y) < ops.margin(logits_of(x), y)).all()


# torch.export ------------------------------------------------------------------------------------------------
class Uses(torch.nn.Module):
    """A model that calls an op with the tensors it is given, and with numbers of its own."""

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.args, self.call, self.mutates = args, public_call(OPS[name]), OPS[name].mutates

    def forward(self, *given: Any) -> list[torch.Tensor]:
        own = iter(given)
        args = [next(own) if tensors(a) else a for a in self.args]
        assert self.call is not None
        result = tensors(self.call(*args))
        return [t + 1 for t in (*result, *(t for i in self.mutates for t in tensors(args[i])))]


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # PyTorch's own, while it saves
@pytest.mark.parametrize(
    ("name", "strict"),
    [
        *((name, False) for name in PUBLIC),
        # traced as by torch.compile, under which test_dispatch has every op: a few say whether it is well here
        *((n, True) if n in FEW else pytest.param(n, True, marks=pytest.mark.slow) for n in PUBLIC),
    ],
)
def test_export(name: str, strict: bool) -> None:
    """The exported program holds the op, and does what the model does; saved and loaded too."""
    args = samples(OPS[name], 4000)[0]
    model = Uses(name, args)
    given = [a for a in args if tensors(a)]
    program = torch.export.export(model, tuple(exact_copy(given)), strict=strict)
    assert f"mwpb.{name}" in program.graph_module.print_readable(print_output=False)
    expected = model(*exact_copy(given))
    core = (
        program.run_decompositions()
    )  # PyTorch 2.13 saves no block under no_grad that gives nothing, such as a write
    for how in (program, core):
        for a, b in zip(how.module()(*exact_copy(given)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    if not strict:
        file = io.BytesIO()
        torch.export.save(core, file)
        file.seek(0)
        for a, b in zip(torch.export.load(file).module()(*exact_copy(given)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# threads -----------------------------------------------------------------------------------------------------
def bits(name: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """What an op gives and writes, as bytes."""
    mine = exact_copy(args)
    result = (*tensors(OPS[name](*mine)), *(t for i in OPS[name].mutates for t in tensors(mine[i])))
    return [t.detach().contiguous().view(-1).view(torch.uint8) for t in result]


@pytest.mark.parametrize("name", NAMES)
def test_python_threads_get_the_same_bits(name: str) -> None:
    """Four at once, each on operands of its own, with derivatives in between."""
    cases = samples(OPS[name], 30_000)[-2:]
    expected = [bits(name, args) for args in cases]
    wrong: list[str] = []
    together = threading.Barrier(4)

    def work() -> None:
        together.wait()
        for _ in range(5):
            for args, wanted in zip(cases, expected, strict=True):
                if not all(map(torch.equal, bits(name, args), wanted)):
                    wrong.append(threading.current_thread().name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# processes ---------------------------------------------------------------------------------------------------
WORKERS = """
import os, sys, torch
from torch.utils.data import DataLoader, Dataset
import mwpb_kernels as ops

KEY = torch.tensor([1])
def attacked(i):
    x = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    index = torch.tensor([i])
    x_adv = ops.uniform_start(x, 0.03, KEY, index)
    return ops.linf_step_(x_adv, x - 0.5, x, 0.03, 0.01)

class Attacked(Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, i):
        return attacked(i)

def collate(batch):
    x = torch.cat(batch)
    return x, ops.margin_radius(x.flatten(1), torch.zeros(len(x), dtype=torch.int64), 8 / 255, 0.58)

if __name__ == "__main__":
    torch.set_num_threads(2)
    print(ops.implementation("linf_step_"))
    big = torch.rand(16, 3, 64, 64)  # the ops' threads, and PyTorch's, are at work before anything forks
    ops.linf_step_(big, big - 0.5, big.clone(), 0.03, 0.01)
    expected = [collate([attacked(i) for i in pair]) for pair in ((0, 1), (2, 3), (4, 5))]
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)  # else PyTorch itself waits forever for threads that are not there
        same = [torch.equal(a, b) for a, b in zip(collate([attacked(0), attacked(1)]), expected[0])]
        os._exit(0 if all(same) else 3)
    assert os.waitpid(child, 0)[1] == 0
    for kind in sys.argv[1:]:
        loader = DataLoader(Attacked(), 2, num_workers=2, collate_fn=collate, multiprocessing_context=kind)
        got = list(loader)
        same = [torch.equal(a, b) for ours, theirs in zip(got, expected) for a, b in zip(ours, theirs)]
        print(kind, len(same), all(same))
"""


def in_workers(folder: Path, *kinds: str) -> list[str]:
    """What a program of its own prints whose data loader forks or spawns its workers."""
    (folder / "workers.py").write_text(WORKERS, encoding="utf-8")
    path = os.pathsep.join([str(Path(ops.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(folder / "workers.py"), *kinds],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[1:]


def test_workers_of_a_data_loader_that_are_forked(tmp_path: Path) -> None:
    assert in_workers(tmp_path, "fork") == ["fork 6 True"]


@pytest.mark.slow  # each worker imports PyTorch anew
def test_workers_of_a_data_loader_that_are_spawned(tmp_path: Path) -> None:
    assert in_workers(tmp_path, "spawn", "forkserver") == ["spawn 6 True", "forkserver 6 True"]
