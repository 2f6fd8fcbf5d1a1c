"""Result files that grow: what a benchmark that is cut off or crashes leaves, and how it goes on."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = ["--model=smallresnet-8", "--batch=4", "--size=8", "--rounds=1", "--device=cpu"]


def content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_what_is_put_survives_and_is_not_done_again(bench: Any, tmp_path: Path, monkeypatch: Any) -> None:
    record, path = bench("record"), tmp_path / "r.json"

    def begin(**more: Any) -> Any:
        return record.Results(path, CPU, [], ["a", "b"], **more)

    first = begin(beside={})
    first.more["beside"]["a"] = 1
    first.put("a", [{"x": 1}], done=False)
    assert content(path)["unfinished"] == ["a", "b"]
    first.put("a", [{"x": 2}])
    first.skip("one of b", RuntimeError("why\nand more"))
    again = begin(beside={})
    assert again.unfinished == ["b"]
    assert again.rows == [{"x": 2, "part": "a"}]
    assert again.more == {"beside": {"a": 1}}
    assert again.skipped == {"one of b": "why"}
    again.put("b", [])
    assert "unfinished" not in content(path)
    assert begin().unfinished == ["a", "b"]  # one that is whole is measured anew
    again.unfinished = ["b"]
    again.write()
    monkeypatch.setattr(sys, "argv", ["other"])
    assert begin().unfinished == ["a", "b"]  # so is that of another command


def test_a_lost_device_ends_the_process_with_its_reason_in_the_file(
    bench: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    record = bench("record")
    results = record.Results(tmp_path / "r.json", CPU, [], ["a"])
    monkeypatch.setattr(record, "usable", lambda device: False)
    with pytest.raises(SystemExit, match="a has left the device unusable"):
        results.skip("a", RuntimeError("an illegal memory access"))
    assert content(tmp_path / "r.json")["skipped"] == {"a": "an illegal memory access"}


def test_what_will_not_fit_is_left(bench: Any, monkeypatch: Any) -> None:
    record, now = bench("record"), [100.0]
    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])
    done = []
    for part in record.Results(None, CPU, [], []).fitting(["a", "b", "c"], 125.0):
        done.append(part)
        now[0] += 10
    assert done == ["a", "b"]


def test_an_op_that_fails_costs_its_own_row_alone(bench: Any, tmp_path: Path, monkeypatch: Any) -> None:
    kernels, path = bench("kernels"), tmp_path / "k.json"
    monkeypatch.setattr(kernels, "DEVICE", CPU)
    real = kernels.difference

    def difference(op: Any, args: Any) -> float:
        if op.name == "margin":
            raise AssertionError("Tensor-likes are not close!")
        return real(op, args)

    monkeypatch.setattr(kernels, "difference", difference)
    monkeypatch.setattr(kernels, "LARGE", 2**16)
    kernels.main(["margin", "linf_step_", "--rounds=1", "--budget=0", "--no-compile", f"--json={path}"])
    found = content(path)
    assert [(r["op"], r["case"], r["share_of_copy"] is None) for r in found["rows"]] == [
        ("margin", "typical", True),
        ("margin", "large", True),
        ("linf_step_", "typical", False),
        ("linf_step_", "large", False),
    ]
    assert found["rows"][0]["implementation"].endswith("failed: Tensor-likes are not close!")
    assert list(found["skipped"]) == ["margin typical", "margin large"]
    monkeypatch.setattr(kernels, "measured", lambda op, *a: sys.exit(9) if op.name == "linf_step_" else {})
    with pytest.raises(SystemExit):
        kernels.main(["linf_step_", f"--json={path}"])
    assert len(content(path)["rows"]) == 4


def test_ops_are_timed_without_pytest() -> None:
    code = f"import sys\nsys.modules['pytest'] = None\nsys.path.insert(0, {str(ROOT / 'bench')!r})\nimport kernels"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, env=os.environ | {"PYTHONPATH": path})


def test_steps_that_need_no_compiler_are_timed_first(bench: Any, tmp_path: Path, monkeypatch: Any) -> None:
    train, steps, path = bench("train"), bench("steps"), tmp_path / "t.json"
    words = [*TINY, "--recipes", "table1.mwpb_at", "table1.mwpb_mart", "--only", "float32", "compiled"]
    built: list[str] = []
    real = steps.build

    def build(variant: Any, config: Any, *rest: Any) -> Any:
        if variant.compiled:
            raise KeyboardInterrupt
        built.append(config.recipe)
        return real(variant, config, *rest)

    for module in (train, steps):
        monkeypatch.setattr(module, "build", build)
    with pytest.raises(KeyboardInterrupt):
        train.main([*words, f"--json={path}"])
    found = content(path)
    assert built[1:3] == ["table1.mwpb_at", "table1.mwpb_mart"]  # after the one that warms up
    assert [(r["recipe"], r["variant"]) for r in found["rows"]] == [(name, "eager float32") for name in built[1:3]]
    assert found["unfinished"] == ["table1.mwpb_at, compiled", "table1.mwpb_mart, compiled"]
    assert built[3:] == ["table1.mwpb_at"]  # beside which the compiled one is timed


def test_a_budget_that_is_spent_leaves_what_is_compiled(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    words = [*TINY, "--recipes", "table1.mwpb_at", "--only", "float32", "--budget=0", f"--json={path}"]
    bench("train").main(words)
    assert content(path)["unfinished"] == ["table1.mwpb_at, compiled"]


def test_a_step_that_lost_its_compiled_code_is_no_compiled_step(bench: Any, monkeypatch: Any) -> None:
    train = bench("train")
    kinds = {"twin compiled": train.Variant(torch.float32, torch.channels_last, twin=True, compiled=True)}
    monkeypatch.setattr(torch, "compile", lambda model, backend: model)  # as where PyTorch passes it over
    o = argparse.Namespace(model="smallresnet-8", batch=2, size=8, device=CPU, tune=False, choices={}, steps=1)
    results = bench("record").Results(None, CPU, [], [])
    running, _ = train.prepare("r", kinds, train.recipe("table1.mwpb_at"), o, results)
    assert not running
    assert results.skipped == {"r: twin compiled": "it ran without what was compiled for it"}


def test_capture_and_compilation_are_timed_together(bench: Any) -> None:
    both = [v for v in bench("train").variants(torch.bfloat16).values() if v.compiled and v.captured]
    assert both
    assert all(v.twin for v in both)


def test_attacks_come_in_the_order_of_their_worth(bench: Any, monkeypatch: Any) -> None:
    attack = bench("attack")
    o = attack.options().parse_args(
        [*TINY, "--steps=1", "--compile", "--tune", "--only", "mwpb", "TRADES", "torch"]
    )
    o.device, o.choices = CPU, {}
    model = attack.build_model(o.model, num_classes=10).eval()
    plain, compiled = attack.contestants(model, o, torch.rand(4, 3, 8, 8), torch.arange(4))
    assert not any("compile" in name for name in plain)
    assert list(compiled) == [
        "TRADES-style, autocast channels-last compile",
        "mwpb twin bf16, compiled, untuned",
        "torchattacks, autocast channels-last compile",
    ]
    tuned: list[str] = []
    monkeypatch.setattr(bench("ceilings"), "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(attack, "tune", lambda net, sample, captured: tuned.append("x"))
    monkeypatch.setattr(torch, "compile", lambda module: module)
    compiled["mwpb twin bf16, compiled, untuned"]()
    assert not tuned
    plain["mwpb twin bf16"]()
    assert tuned


@pytest.mark.parametrize("low", [["bfloat16"], []])
def test_attacks_leave_their_rounds(low: list[str], bench: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Also on a processor that emulates bfloat16: what needs that is skipped by name."""
    attack, path = bench("attack"), tmp_path / "a.json"
    monkeypatch.setattr(bench("ceilings"), "cpu_has_bf16", lambda: bool(low))
    rates = [dict.fromkeys(["float32", *low], 1.0)] * 2

    def matrix_rates(*a: Any) -> dict[str, float]:
        if not rates:
            raise KeyboardInterrupt  # in the third round
        return rates.pop()

    monkeypatch.setattr(bench("rounds"), "matrix_rates", matrix_rates)
    with pytest.raises(KeyboardInterrupt):
        attack.main([*TINY, "--rounds=3", "--steps=1", "--only", "eager", "TRADES", f"--json={path}"])
    found = content(path)
    assert found["unfinished"] == ["not compiled"]
    assert [len(row["seconds"]) for row in found["rows"]] == [2] * (2 + len(low))
    skipped = {} if low else {"TRADES-style, autocast channels-last": "this CPU emulates bfloat16"}
    assert found.get("skipped", {}) == skipped
    assert found["rows"][0]["arithmetic"] == "float32"


def test_a_growing_result_file_is_no_change_of_the_checkout(bench: Any, tmp_path: Path, monkeypatch: Any) -> None:
    measure = bench("measure")
    files = [tmp_path / "code.py", tmp_path / "bench" / "results" / "x.json"]
    files[1].parent.mkdir(parents=True)
    for file in files:
        file.write_text("1")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "first")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    files[1].write_text("2")
    assert "changes" not in measure.commit()
    files[0].write_text("2")
    assert measure.commit().endswith("with changes")
