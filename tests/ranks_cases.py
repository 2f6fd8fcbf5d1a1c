"""Work done by several processes together, as torchrun would start them, but forked from the test's own process,
so that none of them has to import PyTorch anew."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DistributedDataParallel asks for it, and the children have it then
from test_train import StopAfter

from mwpb_fast import train
from mwpb_fast.config import Config, recipe, resolve
from mwpb_fast.runs import checkpoint
from mwpb_fast.system import ranks
from mwpb_fast.system.signals import Interrupted

TINY = ["--epochs=1", "--warmup_epochs=0", "--data.subset=64", "--data.batch_size=16", "--data.validation=0.02"]
TINY += ["--model.name=smallresnet-8", "--attack.steps=2", "--optim.lr=0.01", "--optim.drops=[]"]
# a method of each kind: plain, with the natural images' own term, with weights of the samples, with perturbed
# weights, and with a memory of each image
METHODS = {
    "at": ["digits.mwpb_at"],
    # near the image the divergence has a gradient near 0, whose signs are the roundings': there one process in the
    # other memory layout also parts from itself
    "trades": ["digits.mwpb_trades", "--attack.start=uniform"],
    "mart": ["digits.mwpb_mart"],
    "awp": ["digits.at", "--perturbation=awp"],
    "adaptive": ["digits.at", "--attack=adaptive", "--attack.warmup_epochs=1", "--attack_mode=train"],
}


def tiny(name: str, *options: str) -> Config:
    first, *more = METHODS[name]
    return resolve(recipe(first), [], [*more, *TINY, *options])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def at_once(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` gives in each of `count` processes; what it raises there is raised here."""
    context = multiprocessing.get_context("fork")
    port, ends, processes = free_port(), [], []
    for rank in range(count):
        mine, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=_child, args=(theirs, rank, count, port, work, arguments)))
        processes[-1].start()
        theirs.close()
        ends.append(mine)
    try:
        found = [end.recv() if end.poll(120) else "no answer" for end in ends]
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    failed = [text for good, text in found if not good]
    assert not failed, failed[0]
    return [value for _, value in found]


def _child(end: Any, rank: int, count: int, port: int, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)  # the threads of the parent are not there any more
    place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank}
    given = place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in given.items()}
    try:
        end.send((True, work(*arguments)))
    except BaseException:
        end.send((False, traceback.format_exc()))
    end.close()


def final(folder: Path) -> dict[str, Any]:
    found = checkpoint.read_newest(folder / "checkpoints", "last")
    assert found is not None
    return found[1]


def trained(config: Config, folder: Path) -> None:
    """Train in this process's part."""
    train.run(config, folder, quiet=True)


def stopped(config: Config, folder: Path, steps: int, at: int) -> int:
    """Train until the `at`th process is told to stop after so many steps; returns the signal's number."""
    asked = StopAfter(steps if ranks.number() == at else 10**9)
    with ranks.joined(False):
        try:
            train.Trainer(config, folder, asked, quiet=True).train()  # type: ignore[arg-type]
        except Interrupted as stop:
            return stop.number
    return 0


def apart(one: Path, other: Path) -> float:
    """The largest difference of weights and statistics, as a share of the tensor's largest value."""
    mine, theirs = final(one), final(other)
    assert (mine["epoch"], mine["batch"]) == (theirs["epoch"], theirs["batch"])
    tensors = [(v.float(), theirs["model"][k].float()) for k, v in mine["model"].items()]
    for name, memory in mine["memory"].items():
        tensors += [(v, theirs["memory"][name][k]) for k, v in memory.items()]
    return max(((a - b).abs().max() / a.abs().max().clamp_min(1e-6)).item() for a, b in tensors)
