"""Run as a script by test_fake_cuda.py: steps in bf16 on fake CUDA tensors. Prints one JSON object.

`python fake_cuda_steps.py LIBRARY ENGINE...` gives `steps`, what went wrong by method and engine; `traffic`,
operations and bytes of an attack step by variant; and `training`, those of a training pass.
"""

from __future__ import annotations

import ctypes
import json
import sys
import warnings
from typing import Any

ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # PyTorch looks for a device once, as it is imported

import fake_cuda  # noqa: E402
import torch  # noqa: E402
from test_methods_capture import METHODS  # noqa: E402

from mwpb_fast.config import recipe, resolve  # noqa: E402
from mwpb_fast.engine.build import HALVES, NETS, TRAININGS  # noqa: E402
from mwpb_fast.engine.fused_pass import FusedPass  # noqa: E402
from mwpb_fast.engine.precision import Precision  # noqa: E402
from mwpb_fast.engine.recorder import why_not  # noqa: E402
from mwpb_fast.engine.twin import PLAIN, VARIANTS, TwinNet  # noqa: E402
from mwpb_fast.method import Batch, Method, Net  # noqa: E402
from mwpb_fast.models import build_model  # noqa: E402
from mwpb_fast.models.resnet import BasicBlock, resnet  # noqa: E402
from mwpb_fast.optim import make_optimizer  # noqa: E402
from mwpb_fast.step import Step  # noqa: E402

ALL = METHODS | {
    "at": ("table1.mwpb_at",),
    "fixed": ("table1.at",),
    "trades": ("table1.mwpb_trades",),
    "mart": ("table1.mwpb_mart",),
    "mwpb-st-eval": ("digits.mwpb_at", "--objective=st", "--attack=squeeze", "--attack_mode=eval"),
    "wat": ("digits.mwpb_at", "--objective=wat"),
    "mail": ("digits.mwpb_at", "--objective=mail", "--objective.burn_in_epochs=0"),
    "gairat": (
        "digits.mwpb_at",
        "--objective=gairat",
        "--attack.count_correct=true",
        "--objective.burn_in_epochs=0",
    ),
    "l2": ("digits.mwpb_at", "--attack.norm=l2", "--attack.start=uniform"),
    "deviation": ("digits.mwpb_at", "--budget=deviation"),
}
CUDA = torch.device("cuda", 0)
BF16 = Precision(CUDA, torch.bfloat16, torch.channels_last, oracle=False)


class Watched(fake_cuda.Traffic):
    """Counts, and notes what cannot be captured in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if reason := why_not(func, args, kwargs or {}):
            self.refused.add(f"{func.name()} {reason}")
        return super().__torch_dispatch__(func, types, args, kwargs)


def make_net(model: torch.nn.Module, engine: str, sample: torch.Tensor) -> Net:
    """engine: eager, halves, or a twin's variant; as a run makes it by its name."""
    return NETS["twin" if engine == PLAIN else engine](model, BF16, sample)


def wrong_in_a_step(options: tuple[str, ...], engine: str, training: str = "plain") -> list[str]:
    """What could not be run or captured."""
    name, *rest = options
    config = resolve(recipe(name), [], [*rest, "--attack.steps=2"])
    whole = Method.build(config)
    x, index = torch.rand(8, 3, 8, 8, device=CUDA), torch.arange(8, device=CUDA)
    try:
        with CUDA:
            model = resnet(BasicBlock, (1,), 4, num_classes=10, channels=3)
        net = make_net(model, engine, x)
        whole.remember(100, CUDA)
        step = Step(model, net, make_optimizer(model, config.optim), BF16, config.attack_mode)
        step.trained = TRAININGS[training](model, x)
        batch = Batch(x, torch.zeros_like(index), index)
        with Watched() as seen:
            result = step.compute(batch, torch.ones_like(index[:1]), whole.in_epoch(1))
    except Exception as error:  # whatever a step raises is what the test is to show
        return [f"{type(error).__name__}: {error}"]
    found = sorted(seen.refused)
    if result.radius.shape != (8,) or result.radius.device != CUDA:
        found.append(f"radii {tuple(result.radius.shape)} on {result.radius.device}")
    return found


def attack(net: Net, x: torch.Tensor, steps: int) -> fake_cuda.Traffic:
    config = resolve(recipe("table1.mwpb_at"), [], [f"--attack.steps={steps}"])
    method, index = Method.build(config), torch.arange(len(x), device=CUDA)
    batch, radius = Batch(x, torch.zeros_like(index), index), torch.ones(len(x), device=CUDA)
    with fake_cuda.Traffic() as traffic:
        method.attack(net, batch, None, radius, method.objective.inner, torch.ones_like(index[:1]))
    return traffic


def attack_step(engine: str, batch: int = 128) -> dict[str, Any]:
    """Of a ResNet-18 on CIFAR's images."""
    x = torch.rand(batch, 3, 32, 32, device=CUDA).contiguous(memory_format=torch.channels_last)
    with CUDA:
        net = make_net(build_model("resnet-18", num_classes=10, channels=3).eval(), engine, x)
    found = attack(net, x, 2).less(attack(net, x, 1))
    return {name: dict(getattr(found, name)) for name in ("operations", "own", "besides")}


def training_pass(name: str, batch: int = 128) -> dict[str, Any]:
    """Of a ResNet-18 on CIFAR's images: the loss and its gradient."""
    x = torch.rand(batch, 3, 32, 32, device=CUDA).contiguous(memory_format=torch.channels_last)
    y = torch.zeros(batch, dtype=torch.int64, device=CUDA)
    with CUDA:
        model = build_model("resnet-18", num_classes=10, channels=3)
    trained = TRAININGS[name](model.train(), x)
    objective = Method.build(recipe("table1.mwpb_at")).objective
    with fake_cuda.Traffic() as found:
        with BF16.autocast():
            loss = objective.outer(trained, x, x, y)
        loss.backward()
    return {name: dict(getattr(found, name)) for name in ("operations", "own", "besides")}


def main(*engines: str) -> None:
    fake_cuda.claim()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for made in (TwinNet, FusedPass):
        made._compare = lambda self, x: None  # type: ignore[method-assign]  # there are no values to compare
    with fake_cuda.MODE:
        steps = {f"{m}, {e}": wrong_in_a_step(o, e) for m, o in ALL.items() for e in engines}
        fused = {f"{m}, fused training": wrong_in_a_step(o, "plain", "fused") for m, o in ALL.items()}
        traffic = {variant: attack_step(variant) for variant in ("eager", *VARIANTS, HALVES)}
        training = {name: training_pass(name) for name in ("plain", "fused")}
    print(json.dumps({"steps": steps | fused, "traffic": traffic, "training": training}))


if __name__ == "__main__":
    main(*sys.argv[2:])
