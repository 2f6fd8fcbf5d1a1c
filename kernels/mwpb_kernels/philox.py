"""Counter-based random numbers: Philox 4x32-10 as a function of (seed, stream, sample index, element).

Whatever is random for a sample is a function of the run's seed, the epoch (folded into the seed) and the
sample's index in its data set. So it is the same on every device and implementation, eager or captured, and
after any resume; there is no generator state. Source: Salmon, Moraes, Dror and Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC 2011.

The counter's four words are (group, index low, index high, stream); element 4 * group + w of a sample, in the
row-major order of its logical shape, takes word w. The key is the seed's 64 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mwpb_kernels.op import check_device, check_tensors, tl, triton, whole

STREAM_CROP, STREAM_UNIFORM, STREAM_GAUSSIAN, STREAM_L2, STREAM_ORDER, STREAM_L2_RADIUS = 1, 2, 3, 4, 5, 6

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def derive_seed(seed: int, *words: int) -> int:
    """A 63-bit seed that is a fixed function of `seed` and the further words (an epoch, a purpose).

    The mixing is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    state = _splitmix(whole(seed, "seed") & (2**64 - 1))
    for word in words:
        state = _splitmix(state ^ (whole(word, "word") & (2**64 - 1)))
    return state & (2**63 - 1)


def _splitmix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return z ^ (z >> 31)


def _mul_hi_lo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    # int64 wraps, so the low word is right as it is; the high word is put together from 16-bit halves
    high = ((a >> 16) * m + (((a & 0xFFFF) * m) >> 16)) >> 16
    return high, (a * m) & _MASK


def philox_words(index: Tensor, seed: Tensor, stream: int, groups: int = 1) -> Tensor:
    """The random words of samples.

    index: (B,) int64 sample indices. seed: one-element int64 tensor on the same device. stream: separates
    the uses of one seed. groups: how many counters a sample takes. Returns (B, groups, 4) int64 tensor of
    words in [0, 2**32). Raises ValueError or TypeError for other shapes, types or devices, a stream that is no
    32-bit number and a negative count of groups.
    """
    check_tensors(index=index, seed=seed)
    if index.dim() != 1 or index.dtype != torch.int64:
        raise TypeError(f"index must be (B,) int64, not {tuple(index.shape)} {index.dtype}")
    if seed.numel() != 1 or seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int64 tensor with one element, not {tuple(seed.shape)} {seed.dtype}")
    check_device(index, seed)
    if not 0 <= stream <= _MASK or groups < 0:
        raise ValueError(f"stream must be a 32-bit number and groups not negative, not {stream} and {groups}")
    group = torch.arange(groups, device=index.device, dtype=torch.int64)
    c0, c1 = torch.broadcast_tensors(group[None, :], (index & _MASK)[:, None])
    c2 = ((index >> 32) & _MASK)[:, None].expand_as(c0)
    return torch.stack(_rounds(c0, c1, c2, torch.full_like(c0, stream), seed.reshape(())), dim=-1)


def _rounds(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    """The ten rounds on the four words of counters."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        h0, l0 = _mul_hi_lo(c0, _M0)
        h1, l1 = _mul_hi_lo(c2, _M1)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def uniform_words(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Words as numbers in [0, 1), multiples of 2**-24: exact on every implementation and in both types."""
    return (words >> 8).to(dtype) * 2.0**-24


def normal_words(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Words (..., 4) as standard normals (..., 4) by Box and Muller, pairs (0, 1) and (2, 3)."""
    pairs = words.unflatten(-1, (2, 2)) >> 8
    radius = torch.sqrt(-2.0 * torch.log((pairs[..., 0] + 1).to(dtype) * 2.0**-24))
    angle = pairs[..., 1].to(dtype) * (2.0 * torch.pi * 2.0**-24)
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(-2)


@triton.jit
def philox_block(seed, stream, index, group):
    """Triton: the four uint32 words at int64 `index` and `group` (broadcastable) for a scalar int64 `seed`."""
    c0 = group.to(tl.uint32)
    c1 = (index & 0xFFFFFFFF).to(tl.uint32)
    c2 = ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0, c1 = tl.broadcast(c0, c1)
    c0, c2 = tl.broadcast(c0, c2)
    c3 = tl.zeros_like(c0) + (group * 0 + stream).to(tl.uint32)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    m0 = tl.full((), 0xD2511F53, tl.uint32)
    m1 = tl.full((), 0xCD9E8D57, tl.uint32)
    w0 = tl.full((), 0x9E3779B9, tl.uint32)
    w1 = tl.full((), 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        h0 = tl.umulhi(c0, m0)
        l0 = c0 * m0
        h1 = tl.umulhi(c2, m1)
        l1 = c2 * m1
        c0 = h1 ^ c1 ^ k0
        c1 = l1
        c2 = h0 ^ c3 ^ k1
        c3 = l0
        k0 = k0 + w0
        k1 = k1 + w1
    return c0, c1, c2, c3


@triton.jit
def uniform_block(word):
    """Triton: a uint32 word as float32 in [0, 1), exactly."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-8  # This is 2**-24.


@triton.jit
def normal_block(a, b):
    """Triton: two float32 standard normals from two uint32 words.

    Sine and cosine of a turn by Cephes' polynomials: the library's functions carry a slow path, and a stack, for
    large angles.
    """
    u = ((a >> 8) + 1).to(tl.float32) * 5.9604644775390625e-8
    radius = tl.sqrt(-2.0 * tl.log(u))
    turn = uniform_block(b)
    quarter = tl.floor(turn * 4.0 + 0.5)
    x = (turn - quarter * 0.25) * 6.283185307179586  # It lies in [-pi/4, pi/4], and the difference is exact.
    z = x * x
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    q = quarter.to(tl.int32)
    first = tl.where((q & 1) == 1, cosine, sine)
    second = tl.where((q & 1) == 1, sine, cosine)
    sine = tl.where((q & 2) == 2, -first, first)
    cosine = tl.where(((q + 1) & 2) == 2, -second, second)
    return radius * cosine, radius * sine
