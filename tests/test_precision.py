"""The number types of a run, and the global switches that it sets and puts back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from twin_cases import CPU32, ORACLE, ours, randomise

from mwpb_fast.config import ConfigError, PrecisionConfig, recipe, resolve
from mwpb_fast.engine import build
from mwpb_fast.engine.precision import full_float32, make_precision

CUDNN: Any = torch.backends.cudnn
MATMUL: Any = torch.backends.cuda.matmul
MKLDNN: Any = torch.backends.mkldnn
PLACES = (MATMUL, CUDNN.conv, CUDNN.rnn, MKLDNN.conv, MKLDNN.matmul)


def settings() -> list[Any]:
    """Every switch of float32's inner precision, the older ones as well where PyTorch can still read them."""
    found: list[Any] = [place.fp32_precision for place in PLACES]
    for read in (torch.get_float32_matmul_precision, lambda: CUDNN.allow_tf32, lambda: MATMUL.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append("disagrees")
    return [*found, CUDNN.benchmark, torch.are_deterministic_algorithms_enabled()]


@pytest.fixture
def switches() -> Iterator[None]:
    """Puts PyTorch's defaults back after a test that changes them."""
    before = [place.fp32_precision for place in PLACES]
    yield
    torch.set_float32_matmul_precision("highest")
    CUDNN.allow_tf32 = True
    for place, value in zip(PLACES, before, strict=True):
        place.fp32_precision = value


def as_it_is() -> None:
    pass


def older_switches() -> None:
    torch.set_float32_matmul_precision("medium")
    CUDNN.allow_tf32 = False


def newer_switches() -> None:
    MATMUL.fp32_precision = "tf32"
    CUDNN.conv.fp32_precision = "ieee"


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("start", [as_it_is, older_switches, newer_switches])
def test_full_float32_holds_inside_the_block_only(start: Any) -> None:
    start()
    before = settings()
    with full_float32():
        assert settings()[:5] == ["ieee"] * 5
        assert settings()[5:8] == ["highest", False, False]  # none disagrees: each may be read
        with full_float32(), CUDNN.flags(enabled=True, allow_tf32=False):
            pass
        assert settings()[:8] == ["ieee"] * 5 + ["highest", False, False]
        torch.compile(lambda x: x @ x, backend="aot_eager", fullgraph=True)(torch.ones(2, 2))
    assert settings() == before
    with pytest.raises(ValueError, match="within"), full_float32():
        raise ValueError("within")
    assert settings() == before


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("dtype", "attack", "full"),
    [(FP32, None, True), (FP32, BF16, True), (BF16, FP32, True), (BF16, None, False), (BF16, BF16, False)],
)
def test_fp32_is_all_of_float32(dtype: torch.dtype, attack: torch.dtype | None, full: bool) -> None:
    before = settings()
    precision = dataclasses.replace(CPU32, dtype=dtype, attack_dtype=attack)
    with precision.mode():
        assert (settings() == before) is not full
        assert (CUDNN.conv.fp32_precision == "ieee") is full
    with precision.attack.mode():
        assert (CUDNN.conv.fp32_precision == "ieee") is (precision.attack.dtype == FP32)
    assert settings() == before


def test_the_oracle_is_full_float32_and_deterministic() -> None:
    before = settings()
    with ORACLE.mode():
        assert CUDNN.conv.fp32_precision == "ieee"
        assert torch.are_deterministic_algorithms_enabled()
    assert settings() == before


# CUDA, without a device ---------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two devices that PyTorch believes in; those that were made the current one."""
    current: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: bool(current.append("asked")) or True
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    return current


def test_a_device_with_a_number_becomes_the_current_one(cuda: list[str]) -> None:
    assert make_precision(PrecisionConfig(device="cuda:1", dtype="bf16")).device == torch.device("cuda:1")
    assert cuda[0] == "cuda:1"  # before the current device is asked what it can do
    for device in ("cuda", "auto", "cpu"):
        cuda.clear()
        make_precision(PrecisionConfig(device=device, dtype="fp32"))
        assert cuda == []


@pytest.mark.usefixtures("cuda")
def test_tune_lets_cudnn_choose_by_measurement_too() -> None:
    tuned = make_precision(PrecisionConfig(device="cuda", engine="twin", tune=True))
    assert tuned.benchmark
    assert not make_precision(PrecisionConfig(device="cuda", engine="twin")).benchmark
    assert not make_precision(PrecisionConfig(device="cpu", engine="twin", tune=True)).benchmark
    assert not make_precision(PrecisionConfig(device="cuda", engine="twin", tune=True, oracle=True)).benchmark
    before = settings()
    for precision in (tuned, tuned.attack):
        with precision.mode():
            assert CUDNN.benchmark
        assert settings() == before


def test_bfloat16_on_the_cpu_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, reason in (("AVX2", "ONEDNN_MAX_CPU_ISA=AVX2 rules both out"), ("", "this one has neither")):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda limit=limit: bool(limit))
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        with pytest.raises(ConfigError, match=reason):
            make_precision(PrecisionConfig(device="cpu", dtype="bf16"))


def test_tune_measures_in_the_mode_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(build, "tune", lambda net, sample, **how: seen.append(settings()) or [])
    config = resolve(recipe("digits.mwpb_at"), [], ["--precision.engine=twin", "--precision.tune=true"])
    precision = dataclasses.replace(CPU32, benchmark=True)
    build.make_engine(randomise(ours("smallresnet-8")()), config, precision, torch.rand(2, 3, 8, 8))
    with precision.mode():
        assert seen == [settings()]


@pytest.mark.gpu
def test_convolutions_and_products_on_a_gpu_are_full_float32() -> None:
    x, weight = (torch.randn(2, 256, 8, 8, device="cuda"), torch.randn(256, 256, 3, 3, device="cuda"))
    matrix, bias = torch.randn(256, 256, device="cuda"), torch.zeros(256, device="cuda")
    convolved, product = (torch.conv2d(x.double(), weight.double(), padding=1), matrix.double() @ matrix.double())
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    with dataclasses.replace(CPU32, device=torch.device("cuda")).mode():
        fused = torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        for ours, expected in ((torch.conv2d(x, weight, padding=1), convolved), (fused, convolved.relu())):
            assert ((ours - expected).abs().max() / expected.max()).item() <= 1e-5
        assert ((matrix @ matrix - product).abs().max() / product.max()).item() <= 1e-5
