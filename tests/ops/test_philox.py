"""The random stream against Random123's published answers, on every implementation, and vecmath.h against double.

The C++ headers are compiled here into a small library of their own, once for the plain processor level and once
for the best that this one has.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from mwpb_kernels.op import HAS_TRITON, tl, triton
from mwpb_kernels.philox import (
    STREAM_GAUSSIAN,
    _rounds,
    derive_seed,
    normal_block,
    normal_words,
    philox_block,
    philox_words,
    uniform_words,
)

# Random123 1.14, kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
LEVELS = {
    "baseline": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": [
        *["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
        "-mprefer-vector-width=512",
    ],
}


def signed(word: int, bits: int = 64) -> int:
    return word - (1 << bits) if word >> (bits - 1) else word


def pack(low: int, high: int) -> int:
    return signed(low | high << 32)


@pytest.fixture(scope="module", params=["baseline", "native"])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    level = "baseline" if request.param == "baseline" else torch.backends.cpu.get_cpu_capability()
    if level not in LEVELS or (level == "baseline") != (request.param == "baseline"):
        pytest.skip(f"no further level for {level}")
    folder = tmp_path_factory.mktemp("philox")
    include = Path(__file__).resolve().parents[2] / "kernels" / "csrc"
    flags = ["-std=c++20", "-O3", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    command = [compiler, *flags, *LEVELS[level], f"-I{include}", str(Path(__file__).with_name("philox_calls.cpp"))]
    subprocess.run([*command, "-o", str(folder / "philox.so")], check=True)
    return ctypes.CDLL(str(folder / "philox.so"))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def mapped(function: object, x: np.ndarray, results: int = 1) -> list[np.ndarray]:
    out = [np.empty_like(x) for _ in range(results)]
    function(ctypes.c_int64(len(x)), pointer(x), *(pointer(y) for y in out))  # type: ignore[operator]
    return out


# words -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_reference_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = _rounds(*(torch.tensor([c]) for c in counter), torch.tensor(pack(*key)))
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_native_gives_the_published_words(
    native: ctypes.CDLL, counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    out = np.zeros(12, np.uint32)
    group, low, high, stream = counter
    native.words(
        ctypes.c_uint32(group),
        ctypes.c_int64(pack(low, high)),
        ctypes.c_int64(pack(*key)),
        ctypes.c_uint32(stream),
        pointer(out),
    )
    assert tuple(out[:4].tolist()) == expected
    assert tuple(out[4:8].tolist()) == expected, "the blocks of counters"
    assert tuple(out[8:].tolist()) == expected, "the last of them"


if HAS_TRITON:

    @triton.jit
    def _words_kernel(out_ptr, normal_ptr, seed_ptr, index_ptr, first, stream, GROUPS: tl.constexpr):
        group = first.to(tl.int64) + tl.arange(0, GROUPS)
        w0, w1, w2, w3 = philox_block(tl.load(seed_ptr), stream, tl.load(index_ptr), group)
        at = out_ptr + 4 * tl.arange(0, GROUPS)
        tl.store(at, w0.to(tl.int64))
        tl.store(at + 1, w1.to(tl.int64))
        tl.store(at + 2, w2.to(tl.int64))
        tl.store(at + 3, w3.to(tl.int64))
        n0, n1 = normal_block(w0, w1)
        n2, n3 = normal_block(w2, w3)
        at = normal_ptr + 4 * tl.arange(0, GROUPS)
        tl.store(at, n0)
        tl.store(at + 1, n1)
        tl.store(at + 2, n2)
        tl.store(at + 3, n3)


def run_triton(first: int, index: int, seed: int, stream: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    words = torch.zeros(groups, 4, dtype=torch.int64, device=device)
    normals = torch.zeros(groups, 4, device=device)
    _words_kernel[(1,)](
        out_ptr=words,
        normal_ptr=normals,
        seed_ptr=torch.tensor([seed], device=device),
        index_ptr=torch.tensor([index], device=device),
        first=first,
        stream=stream,
        GROUPS=groups,
    )
    return words.cpu(), normals.cpu()


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton on this platform")
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_triton_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    group, low, high, stream = counter
    words, _ = run_triton(group, pack(low, high), pack(*key), stream, 1)
    assert tuple(words[0].tolist()) == expected


def test_words_depend_on_every_part_of_the_counter() -> None:
    index = torch.tensor([0, 1, 2**32, -1])
    words = philox_words(index, torch.tensor([7]), STREAM_GAUSSIAN, 3)
    assert words.shape == (4, 3, 4)
    assert len(set(words.flatten().tolist())) == words.numel()
    assert 0 <= int(words.min()) <= int(words.max()) < 2**32
    others = [philox_words(index, torch.tensor(s), t, 3) for s, t in ((8, 3), (7 + 2**32, 3), (7, 4))]
    assert all((o != words).all() for o in others)


def test_derive_seed_is_pinned_and_separates_its_words() -> None:
    # SplitMix64's first output for state 0 is 0xE220A8397B1DCDAF
    assert derive_seed(0) == 0xE220A8397B1DCDAF & (2**63 - 1)
    seeds = {derive_seed(s, *w) for s in (0, 1, -1) for w in ((), (0,), (1,), (0, 0), (0, 1), (1, 0))}
    assert len(seeds) == 18
    assert all(0 <= s < 2**63 for s in seeds)


# distributions -----------------------------------------------------------------------------------------------
def test_uniform_and_normal_extremes() -> None:
    words = torch.tensor([[0, 0, 2**32 - 1, 2**32 - 1]])
    assert uniform_words(words).tolist() == [[0.0, 0.0, 1 - 2.0**-24, 1 - 2.0**-24]]
    largest = math.sqrt(48 * math.log(2))
    torch.testing.assert_close(normal_words(words), torch.tensor([[largest, 0.0, 0.0, 0.0]]), rtol=1e-6, atol=1e-6)


def test_normals_have_the_moments_of_the_normal_distribution() -> None:
    n = normal_words(philox_words(torch.arange(50), torch.tensor(3), STREAM_GAUSSIAN, 1000)).flatten().double()
    error = 1 / math.sqrt(n.numel())  # 200,000 numbers; five standard errors of each estimate
    assert abs(n.mean()) < 5 * error
    assert abs(n.square().mean() - 1) < 5 * math.sqrt(2) * error
    assert abs((n**3).mean()) < 5 * math.sqrt(15) * error
    assert abs((n**4).mean() - 3) < 5 * math.sqrt(96) * error
    pairs = n.view(-1, 4)
    assert (torch.corrcoef(pairs.T) - torch.eye(4)).abs().max() < 5 * 2 * error


def test_normals_agree_with_float64_on_every_implementation(native: ctypes.CDLL) -> None:
    index, seed, groups = 2**33 + 5, -(2**40) + 9, 512
    words = philox_words(torch.tensor([index]), torch.tensor(seed), STREAM_GAUSSIAN, groups)[0]
    exact = normal_words(words, torch.float64)
    mine = np.zeros(4 * groups, np.float32)
    native.normals(
        ctypes.c_int64(groups), ctypes.c_int64(index), ctypes.c_int64(seed), ctypes.c_uint32(3), pointer(mine)
    )
    assert (torch.from_numpy(mine).view(-1, 4) - exact).abs().max() < 1e-6
    assert (normal_words(words) - exact).abs().max() < 3e-6  # the angle's rounding, times a radius up to 5.8
    if HAS_TRITON:
        triton_words, normals = run_triton(0, index, seed, STREAM_GAUSSIAN, groups)
        assert torch.equal(triton_words, words)
        assert (normals - exact).abs().max() < 1e-6


# vecmath.h ---------------------------------------------------------------------------------------------------
def ulps(actual: np.ndarray, exact: np.ndarray) -> float:
    """The largest error in units of the last place of the exact value."""
    return float((np.abs(actual.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float32))).max())


def test_exp(native: ctypes.CDLL) -> None:
    x = np.concatenate([np.linspace(-87.3365, 88.7228, 400_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    assert ulps(mapped(native.exps, x)[0], np.exp(x.astype(np.float64))) < 2
    edges = np.array([0, -0.0, -87.4, -1e30, -np.inf, 88.73, 1e30, np.inf, np.nan], np.float32)
    expected = np.array([1, 1, 0, 0, 0, np.inf, np.inf, np.inf, np.nan], np.float32)
    for some in (edges, np.tile(edges, 16)):
        np.testing.assert_array_equal(mapped(native.exps, some)[0], np.resize(expected, some.shape))


def test_exp_of_what_is_not_positive(native: ctypes.CDLL) -> None:
    x = np.linspace(-87.3365, 0, 400_001).astype(np.float32)
    assert ulps(mapped(native.decays, x)[0], np.exp(x.astype(np.float64))) < 2
    edges = np.tile(np.array([0, -0.0, -87.4, -1e30, -np.inf, np.nan], np.float32), 11)
    expected = np.tile(np.array([1, 1, 0, 0, 0, np.nan], np.float32), 11)
    np.testing.assert_array_equal(mapped(native.decays, edges)[0], expected)


def test_log(native: ctypes.CDLL) -> None:
    bits = np.arange(0x00800000, 0x7F800000, 4099, dtype=np.uint32)  # all exponents
    near_one = np.arange(1 << 24, (1 << 24) - 50_000, -1, dtype=np.int64).astype(np.float32) * 2.0**-24
    x = np.concatenate([bits.view(np.float32), near_one, 1 + np.arange(50_000, dtype=np.float32) * 2.0**-23])
    assert ulps(mapped(native.logs, x.astype(np.float32))[0], np.log(x.astype(np.float64))) < 2
    edges = np.array([1, 0, np.inf, np.nan], np.float32)
    expected = np.array([0, -np.inf, np.inf, np.nan], np.float32)
    for some in (edges, np.tile(edges, 17)):
        np.testing.assert_array_equal(mapped(native.logs, some)[0], np.resize(expected, some.shape))


def test_sine_and_cosine_of_turns(native: ctypes.CDLL) -> None:
    turn = (np.arange(0, 1 << 24, 7, dtype=np.int64).astype(np.float32)) * np.float32(2.0**-24)
    sine, cosine = mapped(native.turns, turn, 2)
    angle = turn.astype(np.float64) * 2 * np.pi
    # absolute: values are at most 1, whose last place is 1.2e-7 (6e-8 just below)
    assert np.abs(sine - np.sin(angle)).max() < 1.2e-7
    assert np.abs(cosine - np.cos(angle)).max() < 1.2e-7
    quarters = np.array([0, 0.25, 0.5, 0.75], np.float32)
    sine, cosine = mapped(native.turns, quarters, 2)
    np.testing.assert_array_equal(sine, [0, 1, 0, -1])
    np.testing.assert_array_equal(cosine, [1, 0, -1, 0])
