"""AutoAttack's parts in turn in one run: this project's beside pyautoattack, torchattacks and adv-lib.

    python bench/autoattack.py --json bench/results/autoattack-cpu.json
    python bench/autoattack.py --model resnet-18 --batch 250 --json ...

Each part (apgd-ce, apgd-t with 9 targets, fab-t with 9, square) attacks the same random images, of which the model
gets all right, in a ball so small that none is lost: what is timed is an image that withstands everything, which
is where the time of an evaluation goes. All take the same share of the standard version's iterations, --length
times `SHARES`; images a second are at its full length. Peers run as their users run them: contiguous images,
weights that ask for gradients, and on the CPU the C library's own habit with freed memory. "mwpb-fast" searches
on the folded twin, "mwpb-fast, eager" on the model itself; both judge by the model. On CUDA float32 convolutions
of peers are TF32, as they are by PyTorch's default, and so are those of "mwpb-fast, TF32". A round times each
once, so ratios are between neighbours in time; the result is written after every round.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from measure import command_line, full_float32, hand_back_freed_memory, keep_freed_memory, seconds, settled, spread
from peers import package
from record import Results
from rounds import Rounds
from torch import Tensor, nn

from mwpb_fast.engine.precision import Precision
from mwpb_fast.evaluation.autoattack import COMPONENTS, STANDARD, autoattack
from mwpb_fast.evaluation.model_checks import weights_frozen
from mwpb_fast.evaluation.search import make_search
from mwpb_fast.evaluation.watched import Watched
from mwpb_fast.models import build_model

EPS = 1e-5  # of a ball in which nothing is found
REFERENCE = "pyautoattack"
COLUMNS = (
    ("part", "part", ""),
    ("name", "program", ""),
    ("images_per_second", "images/s at full length", ",.3g"),
    ("times", "times pyautoattack's speed", ".2f"),
    ("low", "least", ".2f"),
    ("high", "most", ".2f"),
)
LENGTHS = {"apgd": "n_iter", "apgd_targeted": "n_iter", "fab": "n_iter", "square": "n_queries"}
# so many iterations that what is done once, such as the package's checks of the model, weighs little
SHARES = {"apgd-ce": 0.5, "apgd-t": 0.1, "fab-t": 0.1, "square": 0.05}
Attack = Callable[[Tensor, Tensor], Tensor]


def ours(model: nn.Module, part: str, o: argparse.Namespace, kind: str) -> Attack:
    """As `mwpb-fast evaluate` runs it; kind: what it searches on."""
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    watched = Watched(model, torch.channels_last, o.device)
    precision = Precision(o.device, torch.float32, torch.channels_last, oracle=False)
    search, why = None, "asked for"
    if kind != "eager":
        with weights_frozen(model), full_float32():
            search, why = make_search(watched, o.x[:4], precision, o.batch, kind == "TF32")
        if search is None:
            raise RuntimeError(f"no twin: {why}")

    def attack(x: Tensor, y: Tensor) -> Tensor:
        with weights_frozen(model), full_float32():
            found = autoattack(watched, x, y, eps=EPS, batch_size=o.batch, components=[part], search=search)
        return found.correct

    return attack


def of_pyautoattack(model: nn.Module, part: str, o: argparse.Namespace) -> Attack:
    component = COMPONENTS[part]

    def attack(x: Tensor, y: Tensor) -> Tensor:
        adversary = package("pyautoattack").AutoAttack(model, eps=EPS, seed=0, device=o.device, version="standard")
        adversary.attacks_to_run = [part]
        for name, value in component.parameters.items():
            setattr(getattr(adversary, component.name), name, value)
        found: Tensor = adversary.run_standard_evaluation(x, y, batch_size=o.batch)[1] == y
        return found

    return attack


def of_torchattacks(model: nn.Module, part: str, o: argparse.Namespace) -> Attack:
    module, count = package("torchattacks"), o.counts[part]
    common = {"eps": EPS, "seed": 0}
    attack: Any = {
        "apgd-ce": lambda: module.APGD(model, steps=count, **common),
        "apgd-t": lambda: module.APGDT(model, steps=count, n_classes=10, **common),
        "fab-t": lambda: module.FAB(model, steps=count, multi_targeted=True, n_classes=10, **common),
        "square": lambda: module.Square(model, n_queries=count, resc_schedule=False, **common),
    }[part]()
    return lambda x, y: (attack(x, y) - x).flatten(1).abs().amax(1) <= 2 * EPS


def of_adv_lib(model: nn.Module, part: str, o: argparse.Namespace) -> Attack:
    """Its APGD. It imports packages for plots and for a distance, of which nothing is used here, and which
    requirements/peers.lock leaves out."""
    idle = {n: mock.MagicMock() for n in ("torchvision", "visdom", "tqdm") if find_spec(n) is None}
    with mock.patch.dict(sys.modules, idle) if idle else contextlib.nullcontext():
        module, count = package("adv_lib.attacks"), o.counts[part]
    call = {"apgd-ce": module.apgd, "apgd-t": module.apgd_targeted}[part]
    own: dict[str, Any] = {"num_targets": 9} if part == "apgd-t" else {"loss_function": "ce"}

    def attack(x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = model(call(model, x, y, eps=EPS, norm=float("inf"), n_iter=count, **own)).argmax(1) == y
        return found

    return attack


def contestants(o: argparse.Namespace) -> dict[str, Callable[[nn.Module, str], Attack]]:
    """By name, what makes each for a part."""
    found: dict[str, Callable[[nn.Module, str], Attack]] = {
        REFERENCE: lambda model, part: of_pyautoattack(model, part, o),
        "mwpb-fast": lambda model, part: ours(model, part, o, "twin"),
        "mwpb-fast, eager": lambda model, part: ours(model, part, o, "eager"),
        "torchattacks": lambda model, part: of_torchattacks(model, part, o),
        "adv-lib": lambda model, part: of_adv_lib(model, part, o),
    }
    if o.device.type == "cuda":
        found["mwpb-fast, TF32"] = lambda model, part: ours(model, part, o, "TF32")
    return {
        name: make
        for name, make in found.items()
        if name == REFERENCE or not o.only or any(w in name for w in o.only)
    }


def rows(part: str, times: dict[str, list[float]], o: argparse.Namespace) -> list[Any]:
    found = []
    for name, taken in times.items():
        rate = spread([o.batch * o.counts[part] / o.full[part] / t for t in taken])
        against = spread([a / b for a, b in zip(times[REFERENCE], taken, strict=True)])
        row = {"name": name, "images_per_second": rate["median"], "times": against["median"]}
        found.append(row | {"low": against["min"], "high": against["max"], "seconds": taken})
    return found


def run(part: str, model: nn.Module, results: Results, o: argparse.Namespace, deadline: float) -> None:
    attacks: dict[str, Attack] = {}
    for name, make in contestants(o).items():
        try:
            attacks[name] = make(copy.deepcopy(model), part)
            if not bool(attacks[name](o.x, o.y).all()):
                raise RuntimeError("an image was lost")
        except KeyError:
            print(f"{name} has no {part}", flush=True)
        except Exception as error:  # a contestant that cannot run is named, and the others go on
            attacks.pop(name, None)
            results.skip(f"{name}, {part}", error)
    times: dict[str, list[float]] = {name: [] for name in attacks}
    rounds = Rounds(o.rounds, deadline, o.device, o.clock)
    for turn in rounds:
        for name, attack in attacks.items():
            if o.kept:
                (keep_freed_memory if "mwpb" in name else hand_back_freed_memory)()
                attack(o.x[: o.batch // 4], o.y[: o.batch // 4])  # to meet the memory as this one leaves it
            times[name].append(seconds(lambda a=attack: a(o.x, o.y), o.device, o.clock))  # type: ignore[misc]
        results.more["beside"][part] = rounds.beside()
        results.put(part, rows(part, times, o), done=False)
        print(f"{part}: round {turn + 1}/{o.rounds}", flush=True)
    results.put(part, rows(part, times, o))
    for row in results.rows[-len(times) :]:
        print(f"  {row['name']}: {row['images_per_second']:.3g} images/s, {row['times']:.2f} times", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smallresnet-16")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--length", type=float, default=1.0, help="of each part, times `SHARES`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=STANDARD, default=list(STANDARD))
    parser.add_argument("--only", nargs="*", default=[], help="programs whose name holds one of these words")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of the process; with --threads 1")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds; what will not fit is left")
    o = settled(parser.parse_args(arguments))
    o.kept = o.kept and hand_back_freed_memory()
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = build_model(o.model, num_classes=10).to(o.device).eval()
    o.x = torch.rand(o.batch, 3, o.size, o.size, device=o.device)
    with torch.no_grad():
        o.y = model(o.x).argmax(1)
    settings = {k: getattr(o, k) for k in ("model", "batch", "size", "length")}
    o.clock = time.process_time if o.cpu_time else time.perf_counter
    settings["clock"] = "CUDA events" if o.device.type == "cuda" else "CPU time" if o.cpu_time else "wall time"
    settings["freed_memory_kept"] = "by mwpb-fast alone" if o.kept else o.kept
    results = Results(o.json, o.device, COLUMNS, o.parts, **settings, beside={})
    end = time.monotonic() + o.budget
    options = {name: LENGTHS[COMPONENTS[name].name] for name in STANDARD}
    o.full = {name: COMPONENTS[name].parameters[option] for name, option in options.items()}
    o.counts = {name: max(2, round(count * o.length * SHARES[name])) for name, count in o.full.items()}
    with contextlib.ExitStack() as stack:
        for name, option in options.items():
            stack.enter_context(mock.patch.dict(COMPONENTS[name].parameters, {option: o.counts[name]}))
        for part in results.fitting(results.unfinished, end):
            run(part, model, results, o, end)


if __name__ == "__main__":
    main()
