"""The ledger: what is compared with what, in which arithmetic, and when it is out of bounds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from mwpb_fast.models import build_model

CPU = torch.device("cpu")


def test_distance_is_of_averages_over_ten_steps(bench: Any) -> None:
    distance = bench("curves").distance
    ramp = torch.arange(40.0)
    assert distance(ramp, ramp + 2) == pytest.approx(2)
    noise = torch.tensor([1.0, -1.0]).repeat(20)
    assert distance(ramp, ramp + noise) == pytest.approx(0, abs=1e-6)
    assert distance(ramp, torch.cat((ramp[:20], ramp[20:] + 3))) == pytest.approx(1.5)


def settings(**more: Any) -> argparse.Namespace:
    given = {"train_model": "smallresnet-8", "train_steps": 4, "train_batch": 4, "attack_steps": 1, "seeds": 3}
    return argparse.Namespace(**given, objectives=("at",), **more)


def test_a_path_that_computes_something_else_is_out_of_bounds(bench: Any, monkeypatch: Any) -> None:
    curves = bench("curves")
    x, y = torch.rand(16, 3, 8, 8), torch.arange(16) % 10
    real = curves.loss_curve

    def loss_curve(objective: str, seed: int, path: Any, *rest: Any) -> Any:
        losses, model = real(objective, seed, path, *rest)
        return (losses + (5.0 if path is curves.PATHS["twin float32"] else 0.0), model)

    monkeypatch.setattr(curves, "loss_curve", loss_curve)
    results = bench("record").Results(None, CPU, [], ["at"])
    curves.training_rows(x, y, settings(), curves.Parts(None, {}), results)
    assert not results.unfinished
    by_path = {row["path"]: row for row in results.rows}
    assert by_path["twin float32"]["in_bounds"] is False
    assert by_path["twin float32"]["distance"] == pytest.approx(5, abs=0.1)
    fine = [row for name, row in by_path.items() if name != "twin float32"]
    assert all(row["distance"] < 0.5 and len(row["seed_distances"]) == 3 for row in fine)
    assert set(results.skipped) >= {"twin and autocast bfloat16, captured"}


def test_parts_are_taken_up_again_by_the_same_settings(bench: Any, tmp_path: Path) -> None:
    parts = bench("curves").Parts
    result = tmp_path / "ledger.json"
    assert parts(result, {"seeds": "3"}).get("a", lambda: torch.ones(2)).tolist() == [1, 1]
    again = parts(result, {"seeds": "3"})
    assert again.get("a", lambda: pytest.fail("made again")).tolist() == [1, 1]
    assert parts(result, {"seeds": "4"}).get("a", lambda: 5) == 5
    again.path.write_bytes(b"cut off")
    assert parts(result, {"seeds": "3"}).get("a", lambda: 7) == 7
    again.done()
    assert list(tmp_path.iterdir()) == []


def test_the_reference_is_in_full_float32_and_the_paths_as_they_run(bench: Any) -> None:
    equivalence, curves = bench("equivalence"), bench("curves")
    seen: dict[str, set[tuple[str, bool]]] = {"reference": set(), "twin": set()}
    backends: Any = torch.backends

    def noting(name: str, net: Any) -> Any:
        for method in ("logits", "input_grad"):
            real = getattr(net, method)

            def call(*a: Any, real: Any = real) -> Any:
                now = (backends.cudnn.conv.fp32_precision, torch.are_deterministic_algorithms_enabled())
                seen[name].add(now)
                return real(*a)

            setattr(net, method, call)
        return net

    model, x = build_model("smallresnet-8", num_classes=10).eval(), torch.rand(4, 3, 8, 8)
    reference = equivalence.EagerNet(model, curves.ORACLE.precision(CPU))
    precision = equivalence.Precision(CPU, torch.bfloat16, torch.channels_last, oracle=False)
    fast = equivalence.EagerNet(model, precision)
    nets = {"reference": noting("reference", reference), "twin": noting("twin", fast)}
    equivalence.attack_rows("w", nets, x, torch.arange(4), 8)
    assert seen == {"reference": {("ieee", True)}, "twin": {("tf32", False)}}
    real, seen["reference"] = curves._curve, set()

    def curve(*a: Any) -> Any:
        seen["reference"].add((backends.cudnn.conv.fp32_precision, torch.are_deterministic_algorithms_enabled()))
        return real(*a)

    try:
        curves._curve = curve
        curves.loss_curve("at", 0, curves.ORACLE, x, torch.arange(4), settings())
    finally:
        curves._curve = real
    assert seen["reference"] == {("ieee", True)}
