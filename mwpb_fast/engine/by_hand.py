"""A folded graph's input gradient written by hand: of each ReLU one bit an element is kept, not its activations.

A convolution ends in one pass (bias, skip and ReLU in place, `bias_add_relu_`), and in front of its ReLU stands
one pass (`gated_sum`) over the gradients behind it. A convolution that is a skip leaves its bias to the layer that
it is added to. What is no convolution is left to autograd, operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any

import mwpb_kernels as ops
import torch
from torch import Tensor, fx

from mwpb_fast.engine.layers import FoldedConv

# From the gradients behind a node to those of its operands.
Backward = Callable[[list[Tensor]], Iterable[tuple[fx.Node, Tensor]]]


class ByHand:
    """Runs the graph that `fold` gives; `refresh` must follow each refresh of its layers."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.module, self.nodes = graph, list(graph.graph.nodes)
        (self.image,) = [node for node in self.nodes if node.op == "placeholder"]
        self.active = {self.image}  # what depends on the image
        self.spent: dict[fx.Node, list[fx.Node]] = {}  # by node: the operands that nothing reads after it
        last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            if any(operand in self.active for operand in node.all_input_nodes):
                self.active.add(node)
            last |= dict.fromkeys(node.all_input_nodes, node)
        for operand, node in last.items():
            self.spent.setdefault(node, []).append(operand)
        self.convolutions = {n: c for n in self.nodes if isinstance(c := self._called(n), FoldedConv)}
        # by the node that adds it: a convolution that leaves its bias to that node, and the sum of both biases
        self.left: dict[fx.Node, tuple[FoldedConv, Tensor]] = {}
        for node, layer in self.convolutions.items():
            for skip in _operands(node)[1:]:
                other = self.convolutions.get(skip)
                if other is None or other.relu or len(skip.users) > 1 or len(skip.args) > 1 or not layer.relu:
                    continue
                if layer.bias32 is not None and other.bias32 is not None:
                    self.left[node] = (other, torch.zeros_like(layer.bias32))
        self.leaving = {skip for skip, _ in self.left.values()}

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow the layers' biases: in place, without a wait for the device."""
        if self.left:
            sums = [total for _, total in self.left.values()]
            torch._foreach_copy_(sums, [self.convolutions[node].bias32 for node in self.left])  # type: ignore[misc]
            torch._foreach_add_(sums, [skip.bias32 for skip, _ in self.left.values()])  # type: ignore[misc]

    def logits(self, x: Tensor) -> Tensor:
        """As Net.logits."""
        return self._forward(x)[0]

    @torch.no_grad()
    def input_grad(self, x: Tensor, dlogits: Callable[[Tensor], Tensor]) -> Tensor:
        """As Net.input_grad."""
        logits, tape = self._forward(x)
        behind: dict[fx.Node, list[Tensor]] = {tape[-1][0]: [dlogits(logits)]}
        while tape:
            node, backward = tape.pop()
            if gradients := behind.pop(node, None):
                for operand, gradient in backward(gradients):
                    behind.setdefault(operand, []).append(gradient)
        return _sum(behind[self.image]).to(x.dtype)

    @torch.no_grad()
    def _forward(self, x: Tensor) -> tuple[Tensor, list[tuple[fx.Node, Backward]]]:
        values: dict[fx.Node, Any] = {self.image: x}
        tape: list[tuple[fx.Node, Backward]] = []
        for node in self.nodes:
            if node.op == "output":
                return values[_operands(node)[0]], tape
            if node is self.image:
                continue
            layer = self.convolutions.get(node)
            if layer is not None and node in self.active and _alike(layer, node, values):
                values[node], backward = self._convolved(node, layer, values)
                tape.append((node, backward))
            elif operands := [n for n in node.all_input_nodes if n in self.active and _is_image(values[n])]:
                values[node], backward = self._differentiated(node, operands, values)
                tape.append((node, backward))
            else:
                values[node] = self._call(node, values)
            for operand in self.spent.get(node, ()):
                del values[operand]
        raise AssertionError("a graph ends in its output")

    def _convolved(self, node: fx.Node, layer: FoldedConv, values: dict[fx.Node, Any]) -> tuple[Tensor, Backward]:
        image, *skips = _operands(node)
        x: Tensor = values[image]
        skip = values[skips[0]].to(layer.dtype) if skips else None
        bias = self.left[node][1] if node in self.left else layer.bias32
        gate = None
        if layer.relu:
            out = layer.convolved(x.to(layer.weight.dtype), None, None)
            gate = ops.bias_add_relu_(out, _zero(out) if bias is None else bias, skip)
        else:
            out = layer.convolved(x.to(layer.weight.dtype), None if layer in self.leaving else layer.bias, skip)
        shape, dtype = x.shape, x.dtype
        del x, skip  # nor may what follows hold them

        def backward(gradients: list[Tensor]) -> Iterator[tuple[fx.Node, Tensor]]:
            if gate is None:
                gradient = _sum(gradients)
            else:
                first, second = gradients[0], _sum(gradients[1:]) if len(gradients) > 1 else None
                gradient = ops.gated_sum(first, second, gate)
            if image in self.active:
                yield image, layer.input_grad(gradient, shape).to(dtype)
            for other in skips:
                if other in self.active:
                    yield other, gradient

        return out, backward

    def _differentiated(
        self, node: fx.Node, operands: list[fx.Node], values: dict[fx.Node, Any]
    ) -> tuple[Any, Backward]:
        """Any operation, by autograd; one that gives no tensor, such as a size, has no gradient."""
        leaves = {n: values[n].detach().requires_grad_() for n in operands}
        with torch.enable_grad():
            out = self._call(node, {**values, **leaves})

        def backward(gradients: list[Tensor]) -> Iterator[tuple[fx.Node, Tensor]]:
            found = torch.autograd.grad(out, list(leaves.values()), _sum(gradients), allow_unused=True)
            yield from ((n, g) for n, g in zip(operands, found, strict=True) if g is not None)

        return out.detach() if isinstance(out, Tensor) else out, backward

    def _called(self, node: fx.Node) -> Any:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            value = self.module
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return value
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        called: Any = node.target if node.op == "call_function" else self._called(node)
        return called(*args, **kwargs)


def _operands(node: fx.Node) -> list[fx.Node]:
    """A folded layer's input, and its skip where it has one; of the output node, what is given out."""
    return [operand for operand in node.args if isinstance(operand, fx.Node)]


def _alike(layer: FoldedConv, node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether the skip, if any, has the result's shape: one that is broadcast is left to autograd."""
    image, *skips = _operands(node)
    return all(values[skip].shape == layer.result_shape(values[image].shape) for skip in skips)


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _sum(gradients: list[Tensor]) -> Tensor:
    return reduce(torch.add, gradients)


def _zero(out: Tensor) -> Tensor:
    return torch.zeros(out.shape[1], device=out.device)
