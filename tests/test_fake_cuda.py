"""Every method's step on fake CUDA tensors, where nothing of a GPU is at hand; what an attack step costs there."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch

SCRIPT = Path(__file__).with_name("fake_cuda_steps.py")


def output(*engines: str) -> Any:
    """What the script prints, in a process of its own; skips without a compiler."""
    if torch.version.cuda is not None:
        pytest.skip("PyTorch's CUDA build has the hooks that this puts in their place")
    try:
        library = fake_cuda.library()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    done = subprocess.run([sys.executable, str(SCRIPT), str(library), *engines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def printed() -> Any:
    return output("plain", "one_kernel_stem")


@pytest.fixture
def traffic(printed: Any) -> Any:
    """By variant, of an attack step of ResNet-18 at batch 128: operations, and bytes in and besides the
    convolutions' own, by operator."""
    return printed["traffic"]


def check(steps: dict[str, list[str]]) -> None:
    assert len(steps) >= 17
    assert not {name: found for name, found in steps.items() if found}


def test_a_step_of_every_method_runs_on_cuda_and_can_be_captured(printed: Any) -> None:
    check(printed["steps"])


@pytest.mark.slow
def test_so_it_does_on_the_model_itself_and_in_two_halves() -> None:
    check(output("eager", "halves")["steps"])


# operations, and bytes besides the convolutions' own in GB, rounded up; what falls should fall here
MOST = {
    "eager": (160, 2.01),
    "plain": (120, 1.6),
    "by_hand": (84, 0.84),
    "one_kernel": (55, 0.31),
    "by_hand_stem": (80, 0.7),
    "one_kernel_stem": (51, 0.18),
    "halves": (168, 0.84),
}


@pytest.mark.parametrize("variant", MOST)
def test_an_attack_step_costs_no_more(traffic: Any, variant: str) -> None:
    operations, gigabytes = MOST[variant]
    found = traffic[variant]
    assert sum(found["operations"].values()) <= operations, found["operations"]
    assert sum(found["besides"].values()) <= gigabytes * 1e9, found["besides"]


def test_the_document_says_what_is_counted(printed: Any, traffic: Any) -> None:
    text = (Path(__file__).parents[1] / "docs" / "performance.md").read_text(encoding="utf-8")
    training = printed["training"].values()
    for found in training:
        operations, gigabytes = sum(found["operations"].values()), sum(found["besides"].values()) / 1e9
        assert f" | {operations} | {gigabytes:.2f} |\n" in text
    rows = re.findall(r"^\| (?:twin, `)?(\w+)[`,].*\| (\d+) \| (\d\.\d\d) \|$", text, re.MULTILINE)
    counted = {v: (sum(t["operations"].values()), sum(t["besides"].values()) / 1e9) for v, t in traffic.items()}
    assert rows == [(v, str(operations), f"{gigabytes:.2f}") for v, (operations, gigabytes) in counted.items()]


# the same of a training pass
MOST_IN_TRAINING = {"plain": (212, 2.09), "fused": (155, 1.33)}


@pytest.mark.parametrize("name", MOST_IN_TRAINING)
def test_a_training_pass_costs_no_more(printed: Any, name: str) -> None:
    operations, gigabytes = MOST_IN_TRAINING[name]
    found = printed["training"][name]
    assert sum(found["operations"].values()) <= operations, found["operations"]
    assert sum(found["besides"].values()) <= gigabytes * 1e9, found["besides"]
    own = {one: sum(t["own"].values()) for one, t in printed["training"].items()}
    assert own["fused"] == own["plain"]


@pytest.mark.parametrize("variant", MOST)
def test_the_convolutions_own_traffic_is_what_their_shapes_say(traffic: Any, variant: str) -> None:
    """By reckoning: inputs, results and weights, both ways, in 2 bytes an element; the twins' stem in 4, or, where
    it has kernels of its own, its weights, and its input forward alone."""
    stage = [(128 * 64 * 1024) >> i for i in range(4)]  # elements of a result: 64 channels at 32x32, then half
    results = 5 * stage[0] + sum(5 * s for s in stage[1:])  # with the shortcuts'
    inputs = 128 * 3 * 1024 + 4 * stage[0] + sum(2 * s + 3 * t for s, t in itertools.pairwise(stage))
    weights = 11_173_962 - 9_600 - 5_130  # all parameters without the norms' and the last layer's
    own = 0 if variant.endswith("stem") else 128 * 3 * 1024 + stage[0]
    stem = 0 if variant == "eager" else own + 64 * 3 * 9
    if variant == "halves":  # each half reads all weights
        weights, stem = 2 * weights, stem + 64 * 3 * 9
    assert sum(traffic[variant]["own"].values()) == 2 * 2 * (results + inputs + weights + stem)
