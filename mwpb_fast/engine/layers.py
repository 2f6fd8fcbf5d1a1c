"""The layers of a folded model: convolution, linear layer and scale-bias, each with what follows it fused in.

Parameters are frozen, so autograd computes the gradient of the input alone. A convolution's epilogue (bias,
residual addition, ReLU) works in place on its output: plain autograd over these layers measured as fast on the
CPU as a hand-written backward. `FUSED` is the library's own fused call where the device has one; `EPILOGUE` is a
convolution without bias, and bias and ReLU in one pass after it; `mwpb_fast.engine.tune` chooses for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mwpb_kernels as ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mwpb_fast.engine.small_maps import Convolution, Products, convolve, serves

PLAIN, FUSED, EPILOGUE = "plain", "fused", "epilogue"
# A convolution of at most so many channels is taken for the one that reads the image.
IMAGE_CHANNELS = 4


class Folded(nn.Module):
    """A layer of the twin and the modules that it stands for.

    source: convolution or linear layer, None for a batch norm alone. norm: the batch norm folded in, or None.
    Buffers: `weight` and `bias` in the attack's dtype, what is run; `weight32` and `bias32`, the fold itself,
    which are the same tensors while the dtype is float32; `scale`, the norm's factor of each channel.
    """

    weight: Tensor
    weight32: Tensor
    scale: Tensor | None
    bias: Tensor | None
    bias32: Tensor | None

    def __init__(self, name: str, source: nn.Module | None, norm: nn.Module | None, relu: bool) -> None:
        super().__init__()
        # A tuple keeps the model's modules from becoming children, and their parameters the twin's.
        self.of = (source, norm)
        self.name, self.relu = name, relu
        reference: Any = norm if source is None else source
        channels = _channels(source, norm)
        like = reference.weight if reference.weight is not None else reference.running_mean
        options = {"dtype": torch.float32, "device": like.device}
        self.scale = torch.ones(channels, **options) if norm is not None else None
        if source is None:
            assert self.scale is not None
            self.weight32, self.bias32 = self.scale, torch.zeros_like(self.scale)
        else:
            self.weight32 = torch.empty_like(like.detach(), **options, memory_format=_format(like))
            has_bias = norm is not None or reference.bias is not None
            self.bias32 = torch.zeros(channels, **options) if has_bias else None
        self.lower(torch.float32)

    def lower(self, dtype: torch.dtype) -> None:
        """Give results in `dtype` from now on, with weights of that type; the next refresh fills them."""
        self.dtype = dtype
        self.hold(dtype)

    def hold(self, dtype: torch.dtype) -> None:
        """Keep the weights in `dtype`."""
        if dtype == torch.float32:
            self.weight, self.bias = self.weight32, self.bias32
            return
        self.weight = torch.empty_like(self.weight32, dtype=dtype)
        self.bias = None if self.bias32 is None else torch.empty_like(self.bias32, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.name}, {tuple(self.weight.shape)}, {self.weight.dtype}, relu={self.relu}"


class FoldedConv(Folded):
    """relu(conv(x) + bias + skip), the last two optional: (B, C, H, W) of any float dtype -> its own dtype.

    The convolution that reads the image keeps float32 weights: it is a hundredth of the work, and rounding the
    image accounts for half of a bf16 twin's error in the input gradient.
    """

    def __init__(self, name: str, source: nn.Conv2d, norm: nn.Module | None, relu: bool) -> None:
        self._reads_image = source.in_channels <= IMAGE_CHANNELS
        super().__init__(name, source, norm, relu)
        self.stride, self.dilation, self.groups = list(source.stride), list(source.dilation), source.groups
        self.padding = _padding(source)
        self.implementation = PLAIN
        self.products: Products | None = None
        self.ones = None if self.bias32 is None else torch.ones_like(self.bias32)

    def hold(self, dtype: torch.dtype) -> None:
        super().hold(torch.float32 if self._reads_image else dtype)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = x.to(self.weight.dtype)
        if self.implementation == FUSED and self.weight.dtype == self.dtype:
            out: Tensor = _Fused.apply(self, x, skip if skip is None else skip.to(self.dtype))
            return out
        if self.implementation == EPILOGUE and self.weight.dtype == self.dtype:
            return self.with_epilogue(x, skip)
        return self.plain(x, skip)

    def plain(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """Bias in the convolution, skip and ReLU in place on its output."""
        out = self.convolved(x, self.bias, skip)
        return out.relu_() if self.relu else out

    def with_epilogue(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """Bias and ReLU in one pass over convolution plus skip: on CUDA, PyTorch would add the bias in a pass of
        its own. Raises where there are not both."""
        if not self.relu or self.bias32 is None or self.ones is None:
            raise RuntimeError("there are no bias and ReLU to fuse")
        return ops.scale_bias_relu(self.convolved(x, None, skip), self.ones, self.bias32)

    def convolved(self, x: Tensor, bias: Tensor | None, skip: Tensor | None) -> Tensor:
        """conv(x) + bias + skip."""
        geometry = (self.stride, self.padding, self.dilation)
        if not serves(x, self.weight, geometry, self.groups):
            out = torch.conv2d(x, self.weight, bias, *geometry, self.groups)
        else:
            if self.products is None or self.products.weight is not self.weight:
                self.products = Products(self.weight)
            self.products.follow()
            out = Convolution.apply(x, self.products, bias)
        out = out.to(self.dtype)
        if skip is None:
            return out
        return out.add_(skip) if skip.shape == out.shape else out + skip

    def input_grad(self, gradient: Tensor, shape: Sequence[int]) -> Tensor:
        """The gradient at the convolution's input, of that shape, from the one at `convolved`'s result."""
        gradient, geometry = gradient.to(self.weight.dtype), (self.stride, self.padding, self.dilation)
        if self.products is not None and serves(gradient, self.weight, geometry, self.groups):
            return convolve(gradient, self.products.backward, None)
        like = gradient.new_empty(1).expand(shape)  # of the input the shape alone is asked for
        given = (*geometry, False, [0, 0], self.groups, (True, False, False))
        of_input, _, _ = torch.ops.aten.convolution_backward(gradient, like, self.weight, None, *given)
        return of_input

    @property
    def simple(self) -> bool:
        """Whether `ops.conv_relu` has its geometry and type: of one stride and padding, in the twin's dtype."""
        return self._even and self.weight.dtype == self.dtype

    @property
    def splits(self) -> bool:
        """Whether `ops.stem_conv` has its geometry and types: of float32, with a result of a half type."""
        return self._even and self.weight.dtype == torch.float32 and self.dtype in (torch.bfloat16, torch.float16)

    @property
    def _even(self) -> bool:
        plain = self.groups == 1 and set(self.dilation) == {1}
        return plain and all(a == b for a, b in (self.stride, self.padding, self.weight.shape[2:]))

    def result_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the result for an input of that shape."""
        taken = zip(shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return (
            shape[0],
            self.weight.shape[0],
            *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in taken),
        )

    def fused(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """The library's fused call: oneDNN on the CPU, cuDNN on CUDA. Raises where it has none."""
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        if x.device.type == "cpu":
            relu = "relu" if self.relu else "none"
            call = torch.ops.mkldnn._convolution_pointwise
            if skip is None:
                return call(x, self.weight, self.bias, *geometry, relu, [], "")
            return call.binary(
                x, skip, self.weight, self.bias, *geometry, "add", None, "relu" if self.relu else None, [], ""
            )
        if not self.relu:
            raise RuntimeError("cuDNN's fused convolutions end in a ReLU")
        padding, stride, dilation, groups = geometry
        if skip is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, stride, padding, dilation, groups)
        return torch.cudnn_convolution_add_relu(
            x, self.weight, skip, 1.0, self.bias, stride, padding, dilation, groups
        )


class FoldedLinear(Folded):
    """relu(x W^T + bias): (B, features) -> (B, outputs). The one that gives the logits stays in float32."""

    gives_logits = False

    def hold(self, dtype: torch.dtype) -> None:
        super().hold(torch.float32 if self.gives_logits else dtype)

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return out.relu_() if self.relu else out


class FoldedNorm(Folded):
    """relu(x * scale + bias) for each channel: a batch norm that no convolution precedes.

    Scale and bias stay float32 beside activations of any dtype: that costs nothing and rounds less. With its
    ReLU it is one fused op: on the CPU half of the time of the two that it stands for, and the input is not kept.
    """

    def __init__(self, name: str, source: None, norm: nn.Module, relu: bool) -> None:
        super().__init__(name, source, norm, relu)
        self.zeros, self.halves = torch.zeros_like(self.weight32), torch.full_like(self.weight32, 0.5)

    def hold(self, dtype: torch.dtype) -> None:
        super().hold(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        assert self.bias is not None
        if self.relu:
            return ops.scale_bias_relu(x, self.weight, self.bias)
        # PyTorch's eval-mode batch norm, with mean 0 and variance plus eps exactly 1, is its one-pass scale and
        # bias; torch 2.11 takes no eps of 0
        return F.batch_norm(x, self.zeros, self.halves, self.weight, self.bias, training=False, eps=0.5)


class _Fused(torch.autograd.Function):
    """The fused forward call, with the input's gradient as its whole backward."""

    @staticmethod
    def forward(ctx: Any, layer: FoldedConv, x: Tensor, skip: Tensor | None) -> Tensor:
        out = layer.fused(x, skip)
        ctx.layer = layer
        ctx.save_for_backward(x, out if layer.relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), layer = gradients, ctx.layer
        x, out = ctx.saved_tensors
        if out is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
        geometry = (layer.stride, layer.padding, layer.dilation, False, [0, 0], layer.groups)
        of_input = None
        if ctx.needs_input_grad[1]:
            of_input, _, _ = torch.ops.aten.convolution_backward(
                gradient, x, layer.weight, None, *geometry, (True, False, False)
            )
        return None, of_input, gradient if ctx.needs_input_grad[2] else None


def _channels(source: Any, norm: Any) -> int:
    if isinstance(source, nn.Conv2d):
        return source.out_channels
    return norm.num_features if source is None else source.out_features


def _format(weight: Tensor) -> torch.memory_format:
    return torch.channels_last if weight.dim() == 4 else torch.contiguous_format


def _padding(source: nn.Conv2d) -> list[int]:
    """As numbers. Raises ValueError where 'same' is not symmetric."""
    if source.padding == "valid":
        return [0, 0]
    if source.padding == "same":
        total = [d * (k - 1) for d, k in zip(source.dilation, source.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            raise ValueError("its padding is not symmetric")
        return [t // 2 for t in total]
    return [int(p) for p in source.padding]
