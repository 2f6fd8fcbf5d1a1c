"""The benchmarks' arithmetic: what they count, compare and conclude; their timings are nobody's test."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mwpb_fast.config import recipe
from mwpb_fast.models import build_model

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


# counts -------------------------------------------------------------------------------------------------------
def test_multiply_adds_of_a_resnet(bench: Any) -> None:
    model = build_model("resnet-18", num_classes=10).train()
    macs = bench("ceilings").multiply_adds(model, 32)
    assert macs == pytest.approx(0.555e9, rel=2e-3)
    assert model.training
    assert all(m.num_batches_tracked == 0 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(("name", "passes"), [("at", 1), ("trades", 2), ("mart", 2)])
def test_flop_of_a_step(bench: Any, name: str, passes: int) -> None:
    """Margin forward, ten forwards and input gradients, a training pass of three forwards' worth each."""
    config = recipe(f"table1.mwpb_{name}")
    flop = bench("train").flop_per_image(config, 1000, argparse.Namespace())
    assert flop == 2 * 1000 * (1 + 2 * 10 + 3 * passes)


def test_flop_of_plain_at_has_no_margin_forward(bench: Any) -> None:
    assert bench("train").flop_per_image(recipe("table1.at"), 1, argparse.Namespace()) == 2 * 23


def test_roofline_shapes(bench: Any) -> None:
    roofline = bench("roofline")
    model = build_model("resnet-18", num_classes=10).eval()
    found = roofline.shapes(model, 128, 32)
    macs = bench("ceilings").multiply_adds(model, 32)
    assert sum(shape.flop * count for shape, count in found.items()) == 2 * 128 * macs
    wide = next(s for s in found if s.weight == (64, 64, 3, 3))
    assert found[wide] == 4
    assert wide.flop == 2 * 128 * 32 * 32 * 64 * 64 * 9
    assert wide.bytes(2) == 2 * (2 * 128 * 64 * 32 * 32 + 64 * 64 * 9)
    assert wide.flop / wide.bytes(2) == pytest.approx(288, rel=3e-3)  # performance.md's figure
    down = next(s for s in found if s.weight == (128, 64, 1, 1))
    assert down.out == (128, 128, 16, 16)


def test_roofline_names_the_bound(bench: Any) -> None:
    rows, ceilings = bench("roofline").roofline(
        build_model("smallresnet-8", num_classes=10).eval(), 2, 8, torch.float32, CPU, rounds=1, budget=0
    )
    assert rows[-1]["layer"] == "all"
    for row in rows[:-1]:
        above = row["intensity"] > ceilings["ridge_flop_per_byte"]
        assert row["bound"] == ("arithmetic" if above else "memory")
        ceiling = row["gflop"] * 1e9 / ceilings["flop_per_second"], row["mb"] * 1e6 / ceilings["bytes_per_second"]
        assert row["least_us"] == pytest.approx(1e6 * max(ceiling))
    assert rows[-1]["least_us"] == pytest.approx(sum(r["least_us"] * r["count"] for r in rows[:-1]))


def test_memory_is_that_of_the_block(bench: Any) -> None:
    measure = bench("measure")
    kept = torch.ones(2**24)  # 64 MiB before, which do not count
    with measure.Memory(CPU) as memory:
        torch.ones(2**25)  # 128 MiB, freed again
    if memory.bytes is None:
        pytest.skip("this system does not tell a process's peak")
    assert 100 * 2**20 < memory.bytes < 190 * 2**20
    assert kept[0] == 1


def test_float32_on_cuda_is_called_what_it_is(bench: Any, monkeypatch: Any) -> None:
    ceilings, cuda = bench("ceilings"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert ceilings.arithmetic(torch.float32, CPU) == "float32"
    assert ceilings.arithmetic(torch.float32, cuda) == "TF32"
    assert ceilings.arithmetic(torch.bfloat16, cuda) == "bfloat16"
    with bench("measure").full_float32():
        assert ceilings.arithmetic(torch.float32, cuda) == "float32"
    products: Any = torch.backends.cuda.matmul
    before = products.fp32_precision
    with ceilings.products_in("TF32"):
        assert products.fp32_precision == "tf32"
        # the older switches agree, so what reads them, as PyTorch's own calls of cuBLAS do, does not raise
        assert (products.allow_tf32, torch.get_float32_matmul_precision()) == (True, "high")
    assert products.fp32_precision == before != "tf32"
    assert (products.allow_tf32, torch.get_float32_matmul_precision()) == (False, "highest")


@pytest.mark.parametrize(("flop_per_second", "size"), [(1e12, 2048), (2e10, 1024), (1e6, 256)])
def test_a_rate_is_measured_within_its_time(
    bench: Any, monkeypatch: Any, flop_per_second: float, size: int
) -> None:
    """On a clock that goes with the products: no reading is begun that would take longer than allowed, however
    slow the machine, but for the smallest one's."""
    ceilings, now, sizes = bench("ceilings"), [0.0], []

    def product(a: torch.Tensor, b: torch.Tensor) -> None:
        sizes.append(len(a))
        now[0] += 2 * len(a) ** 3 / flop_per_second

    monkeypatch.setattr(ceilings.torch, "mm", product)
    rate = ceilings.matrix_rate(torch.float32, CPU, lambda: now[0])
    assert rate == pytest.approx(flop_per_second)
    assert sizes[-1] == max(sizes) == size
    least = (ceilings.READINGS + 1) * 2 * ceilings.SMALLEST**3 / flop_per_second
    assert now[0] <= max(ceilings.LIMIT * 8 / 7, least)


def test_an_emulated_type_is_named_and_not_timed(bench: Any, monkeypatch: Any) -> None:
    ceilings = bench("ceilings")
    real = ceilings.matrix_rate
    monkeypatch.setattr(ceilings, "matrix_rate", lambda dtype, *a: 1.0)
    for has, kinds in ((True, {"float32", "bfloat16"}), (False, {"float32"})):
        monkeypatch.setattr(ceilings, "cpu_has_bf16", lambda has=has: has)
        assert set(ceilings.matrix_rates(CPU)) == kinds
    with pytest.raises(bench("measure").SkippedError, match="emulates bfloat16"):
        real(torch.bfloat16, CPU)
    assert not ceilings.emulated(torch.bfloat16, torch.device("cuda"))
    with pytest.raises(bench("measure").SkippedError, match="emulates bfloat16"):
        bench("peers").Autocast(nn.Flatten(), CPU)
    assert [dtype for _, dtype, _ in bench("equivalence").attack_paths(CPU)] == [torch.float32]
    roofline = bench("roofline")
    monkeypatch.setattr(roofline, "matrix_rate", real)
    with pytest.raises(SystemExit, match="--dtype bf16: this CPU emulates bfloat16"):
        roofline.main(["--model=smallresnet-8", "--dtype=bf16", "--device=cpu"])


def test_gradient_agreement_is_of_the_absolute_mass(bench: Any) -> None:
    class Net:
        def __init__(self, gradient: list[float]) -> None:
            self.gradient = torch.tensor(gradient).view(1, 1, 1, 4)

        def input_grad(self, x: torch.Tensor, dlogits: Any) -> torch.Tensor:
            dlogits(torch.zeros(1, 10))
            return self.gradient

    found = bench("equivalence").gradient_agreement(
        Net([4.0, 3.0, -2.0, 1.0]), Net([1.0, -9.0, -9.0, 1.0]), torch.zeros(1, 1, 1, 4), torch.tensor([0])
    )
    assert found == {"mass_agreeing": pytest.approx(0.7), "signs_agreeing": pytest.approx(0.75)}


# conclusions --------------------------------------------------------------------------------------------------
def test_fastest_peers_are_told_apart(bench: Any) -> None:
    ratios = {
        "mwpb twin bf16": [1.0, 1.0],
        "a, as used": [3.0, 3.0],
        "b, as used": [2.0, 2.5],
        "b, autocast channels-last": [1.5, 1.5],
    }
    spread = bench("measure").spread
    rows = [{"name": n, "slower": spread(r)["median"], "slower_spread": spread(r)} for n, r in ratios.items()]
    found = bench("attack").fastest(rows)
    assert found["as used"]["name"] == "b, as used"
    assert found["as used"]["slower"] == {"median": 2.25, "min": 2.0, "max": 2.5}
    assert found["tuned by their user"]["slower"]["median"] == 1.5


def test_targets_are_filled_from_the_files(bench: Any, tmp_path: Path) -> None:
    def write(name: str, rows: list[dict[str, Any]], **more: Any) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows, **more}))

    recipes = ("table1.mwpb_at", "table1.mwpb_at", "table1.mwpb_mart")
    write("train", [{"recipe": r, "epoch_seconds": s} for r, s in zip(recipes, (9.0, 3.6, 1.0), strict=True)])
    wrn = [{"recipe": "table2.mwpb_at", "epoch_seconds": 40.0}]
    write("train-wrn", wrn, failed="cut off after 45 s")
    names = ("mwpb twin bf16", "TRADES-style, as used", "TRADES-style, autocast channels-last")
    write(
        "attack", [{"name": n, "slower": s} for n, s in zip(names, (1.0, 7.5, 1.4), strict=True)], unfinished=["x"]
    )
    ops = (
        ("linf_step_", "large", 0.7),
        ("crop_flip", "large", 0.75),
        ("linf_step_", "typical", 2.0),
        ("awp_perturb_", "large", None),
    )
    write("kernels", [{"op": o, "case": c, "share_of_copy": s} for o, c, s in ops])
    rows = {row["row"]: row for row in bench("targets").summary(tmp_path, "cuda")}
    met = {name.split(",")[0]: (row["measured"], row["met"]) for name, row in rows.items()}
    assert met["RN-18 MWPB-AT"] == ("3.60", "target")
    assert met["WRN-34-10 MWPB-AT"] == ("40.0 (in part)", "good")
    assert met["110 epochs of Table 1's steps"] == ("6.6", "target")
    assert met["fused element-wise ops"] == ("70%", "missed")  # the median with an op that failed
    assert met["attack against a TRADES-style float32 loop"] == ("7.50x (in part)", "target")
    assert met["attack against that loop with bf16 autocast"] == ("-", "not measured")
    on_cpu = {row["row"]: row["met"] for row in bench("targets").summary(tmp_path, "cpu")}
    assert on_cpu["attack, times the speed of the fastest peer as used"] == "beyond"


def test_the_default_loader_is_the_faster_one() -> None:
    files = sorted((ROOT / "bench" / "results").rglob("loaders*.json"))
    if not files:
        pytest.skip("the loaders were not measured yet")
    for path in files:
        rows = json.loads(path.read_text())["rows"]
        for name in {row["set"] for row in rows if "set" in row}:
            rate = {default: 0.0 for default in (True, False)}
            for row in (r for r in rows if r["set"] == name):
                rate[row["default"]] = max(rate[row["default"]], row["images_per_second"])
            assert rate[True] > rate[False], f"{path.stem}, {name}: change what data.loader=auto takes"


def test_waiting_of_a_loader_is_measured_in_a_step(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders, now = bench("loaders"), 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now)

    class Slow:
        def __len__(self) -> int:
            return 5

        def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
            for _ in range(5):
                sleep(0.03)
                yield torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), torch.arange(2)

    o = argparse.Namespace(device=CPU, steps=9)
    seconds, share = loaders.in_training(Slow(), lambda *a: sleep(0.01), None, o)
    assert seconds == pytest.approx(0.04)
    assert share == pytest.approx(0.75)
    assert math.isclose(loaders.alone(Slow(), 1, 9.0, CPU), 2 / 0.03, rel_tol=1e-6)


def test_folders_of_jpegs_for_the_loaders(bench: Any, tmp_path: Path) -> None:
    """At 64 Tiny-ImageNet's own files, byte for byte, at another size so many of them, made larger."""
    from test_data_sets import tiny_files, write

    loaders, files = bench("loaders"), tiny_files()
    write(tmp_path / "tinyimagenet.tar", files)
    for size, each in ((64, 2), (96, 1)):
        o = argparse.Namespace(shared=tmp_path, jpegs=3, data_dir=str(tmp_path), batch=8)
        config, images = loaders.prepared(f"folder:{size}", o, tmp_path / str(size))
        assert tuple(images.images.shape) == (3 * each, 3, size, size)
        assert config.batch_size == (8 if size == 64 else 2)
        kept = loaders.data.load_encoded(config)
        theirs = [content for name, content in files.items() if name.startswith("t/train/") and name.endswith("G")]
        assert ({bytes(kept[i]) for i in range(len(kept))} == set(theirs)) == (size == 64)
