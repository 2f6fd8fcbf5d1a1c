"""A batch norm in training, what is added and the ReLU, beside PyTorch's own layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mwpb_kernels import batch_norm_relu, force_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=["native", "reference"], autouse=True)
def _implementation(request: pytest.FixtureRequest) -> Any:
    with force_reference(request.param == "reference"):
        yield


def layer(channels: int, dtype: torch.dtype, momentum: float = 0.1) -> torch.nn.BatchNorm2d:
    norm = torch.nn.BatchNorm2d(channels, momentum=momentum, eps=1e-3)
    norm = norm.double() if dtype == torch.float64 else norm
    with torch.no_grad():
        for t, low in ((norm.weight, 0.5), (norm.bias, -0.5), (norm.running_mean, 0.0), (norm.running_var, 0.5)):
            t.uniform_(low, low + 1)  # type: ignore[union-attr]
    return norm


def ours(norm: torch.nn.BatchNorm2d, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
    running: Any = (norm.running_mean, norm.running_var)
    return batch_norm_relu(x, norm.weight, norm.bias, *running, skip, norm.momentum or 0.0, norm.eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skipped", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(4, 9, 5, 3), (1, 8, 3, 3), (7, 16, 1, 1)])
def test_it_is_pytorchs_own_layers(
    dtype: torch.dtype, skipped: bool, layout: torch.memory_format, shape: tuple[int, ...]
) -> None:
    """Values, all gradients and running statistics; in half types within their one rounding of the exact ones."""
    norm, mine = layer(shape[1], dtype, 0.25), layer(shape[1], dtype, 0.25)
    mine.load_state_dict(norm.state_dict())
    x, skip, g = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(3))
    x = x * 2 + 3
    exact = [t.to(norm.weight.dtype).requires_grad_() for t in (x, skip)]
    expected = F.relu(norm(exact[0]) + (exact[1] if skipped else 0))
    wanted = [exact[0], norm.weight, norm.bias, *([exact[1]] if skipped else [])]
    gradients = torch.autograd.grad(expected, wanted, g.to(expected.dtype))
    leaves = [t.clone().requires_grad_() for t in (x, skip)]
    out = ours(mine, leaves[0], leaves[1] if skipped else None)
    found = torch.autograd.grad(out, [leaves[0], mine.weight, mine.bias, *([leaves[1]] if skipped else [])], g)
    assert (out.dtype, out.stride()) == (dtype, torch.empty_like(x).stride())
    half = dtype in (torch.bfloat16, torch.float16)
    near = {"rtol": 2.0**-7 if half else 2e-5, "atol": 1e-2 if half else 1e-5}
    torch.testing.assert_close(out.to(expected.dtype), expected, **near)
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, **near)
    for a, b in ((mine.running_mean, norm.running_mean), (mine.running_var, norm.running_var)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_running_statistics_follow_over_steps() -> None:
    """With the unbiased variance, momentum by momentum, as the layer's own do."""
    norm, mine = layer(5, torch.float32), layer(5, torch.float32)
    mine.load_state_dict(norm.state_dict())
    for _ in range(4):
        x = torch.randn(3, 5, 2, 2) * 3 + 100  # whose squares would lose the variance
        norm(x)
        ours(mine, x)
    torch.testing.assert_close(mine.running_mean, norm.running_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(mine.running_var, norm.running_var, rtol=1e-5, atol=0)


def test_one_value_a_channel_is_refused_as_pytorch_does() -> None:
    norm = layer(3, torch.float32)
    for shape in ((1, 3), (1, 3, 1, 1), (0, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"has [01] values a channel, whose variance needs two"):
            ours(norm, torch.ones(shape))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm(torch.ones(1, 3, 1, 1))
    assert ours(norm, torch.ones(2, 3)).shape == (2, 3)


def test_a_channel_without_variance_gives_its_bias() -> None:
    norm = layer(2, torch.float32)
    out = ours(norm, torch.full((3, 2, 4, 4), 7.0))
    torch.testing.assert_close(out, torch.relu(norm.bias.detach())[None, :, None, None].expand(3, 2, 4, 4))


def test_what_is_not_finite_stays_in_its_channel() -> None:
    norm, x = layer(3, torch.float32), torch.randn(2, 3, 4, 4)
    x[0, 1, 2, 2] = float("inf")
    out = ours(norm, x)
    assert out[:, 1].isnan().all()
    assert out[:, [0, 2]].isfinite().all()
    assert norm.running_mean is not None
    assert norm.running_mean.isnan().tolist() == [False, True, False]


X, V = torch.ones(2, 3, 4, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((torch.ones(3), V, V, V, V), ValueError, r"x must be \(B, C"),
        ((X.int(), V, V, V, V), TypeError, "x must be float32"),
        ((X, torch.ones(2), V, V, V), ValueError, r"weight must be \(3,\)"),
        ((X, V, V, V.half(), V), TypeError, "running_mean must be torch.float32 beside"),
        ((X.half(), V, V, V, V.half()), TypeError, "running_var must be torch.float32 beside"),
        ((X, V, V, V, V, X[:1]), ValueError, "skip is"),
        ((X, V, V, V, V, X.half()), ValueError, "skip is"),
        ((X, V, V, V, V, None, "0.1"), TypeError, "momentum must be a number"),
        ((X.to("meta"), V, V, V, V), ValueError, "different devices"),
    ],
)
def test_refuses(args: tuple[Any, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        batch_norm_relu(*args)
