"""The fold of all layers at once, against the three passes that it stands for, bit by bit."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CPU, INTERPRETED, OPS, RUNNERS, TRITON_DEVICE, tree
from mwpb_kernels import fold_

EVERY = pytest.mark.parametrize("runner", [name for name in RUNNERS if name != "native"])


def folded(
    runner: str, weights: list[torch.Tensor], sources: list[torch.Tensor], scales: list[torch.Tensor]
) -> list[torch.Tensor]:
    there = tree(lambda t: t.to(TRITON_DEVICE if runner == "triton" else CPU), (weights, sources, scales))
    RUNNERS[runner](OPS["fold_"], there)
    return [w.to(CPU) for w in there[0]]


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_copy_product_and_rounding(runner: str, dtype: torch.dtype) -> None:
    """Channels of which several, one, or a part fill a block; the layouts of models; a source in another layout.
    Triton's interpreter cuts what a device rounds to bfloat16."""
    torch.manual_seed(0)
    sources = [torch.randn(s) for s in ((64, 3, 3, 3), (4, 2500), (2, 1024), (33, 5), (16, 8, 1, 1), (7,))]
    sources[0] = sources[0].contiguous(memory_format=torch.channels_last)
    sources += [torch.randn(8, 6, 3, 3).contiguous(memory_format=torch.channels_last), torch.randn(16, 12).t()]
    scales = [torch.randn(len(s)) for s in sources]
    weights = [torch.full(s.shape, math.nan, dtype=dtype) for s in sources]
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    expected = [(s * f.view(-1, *[1] * (s.dim() - 1))).to(dtype) for s, f in zip(sources, scales, strict=True)]
    for number, (got, wanted) in enumerate(zip(folded(runner, weights, sources, scales), expected, strict=True)):
        cut = runner == "triton" and INTERPRETED and dtype == torch.bfloat16
        torch.testing.assert_close(got, wanted, rtol=2**-7 if cut else 0, atol=0, msg=f"tensor {number}")
        assert got.stride() == weights[number].stride()


def test_what_does_not_match_is_refused() -> None:
    w, s, f = torch.zeros(3, 2, dtype=torch.bfloat16), torch.zeros(3, 2), torch.ones(3)
    fold_([], [], [])
    for message, lists in {
        "1 weights need as many sources and scales, not 1 and 0": ([w], [s], []),
        r"sources\[0\] must be float32 or float64, not torch.bfloat16": ([w], [w], [f]),
        r"weights\[1\] torch.float16 and scales": ([w, w.half()], [s, s], [f, f]),
        r"weights\[0\] torch.bfloat16 and scales\[0\] torch.float64": ([w], [s], [f.double()]),
        r"weights\[0\] torch.bfloat16": ([w], [s.double()], [f.double()]),
        r"scales\[0\] must be alike, of a factor a channel, not \(3, 2\), \(3, 2\) and \(2,\)": (
            [w],
            [s],
            [f[:2]],
        ),
        r"must be alike": ([w], [s[:2]], [f[:2]]),
        "different devices": ([w], [s.to("meta")], [f]),
        "is expanded": ([w[:1].expand(3, 2)], [s], [f]),
    }.items():
        with pytest.raises((ValueError, TypeError), match=message):
            fold_(*lists)
