"""A folded graph's input gradient written by hand: of each ReLU one bit an element is kept, not its activations.

A convolution ends in one pass (bias, skip and ReLU in place, `bias_add_relu_`), and in front of its ReLU stands
one pass (`gated_sum`) over the gradients behind it; or the convolution's own kernel does both. A convolution that
is a skip leaves its bias to the layer that it is added to. What is no convolution is left to autograd, one
operation at a time. The layer that reads the image can have kernels of its own, of which the last one takes an
attack's step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import mwpb_kernels as ops
import torch
from torch import Tensor, fx

from mwpb_fast.engine.layers import FoldedConv
from mwpb_fast.method import DLogits


class Behind:
    """The gradients that have come back to each node so far. gates: of the nodes that end in a ReLU. passed: of a
    node, what has come back through its gate already, and then it is all."""

    def __init__(self) -> None:
        self.waiting: dict[fx.Node, list[Tensor]] = {}
        self.gates: dict[fx.Node, Tensor] = {}
        self.passed: dict[fx.Node, Tensor] = {}

    def add(self, node: fx.Node, gradient: Tensor) -> None:
        self.waiting.setdefault(node, []).append(gradient)

    def sum(self, node: fx.Node) -> Tensor | None:
        """Of what has come back, in front of the gate, and from now on nothing."""
        gradients = self.waiting.pop(node, None)
        return None if gradients is None else reduce(torch.add, gradients)

    def take(self, node: fx.Node) -> Tensor | None:
        """The gradient of the node's own operation; None where none has come back."""
        if (passed := self.passed.pop(node, None)) is not None or node not in self.waiting:
            return passed
        gate = self.gates.pop(node, None)
        if gate is None:
            return self.sum(node)
        first, *others = self.waiting.pop(node)
        return ops.gated_sum(first, reduce(torch.add, others) if others else None, gate)


# From the gradient of a node's operation to those of its operands.
Backward = Callable[[Tensor, Behind], None]


class ByHand:
    """Runs the graph that `fold` gives; `refresh` must follow each refresh of its layers."""

    def __init__(self, graph: fx.GraphModule, one_kernel: bool = False, stem: bool = False) -> None:
        """one_kernel: of a convolution and what follows it, forward and backward, where it has one stride and so
        on: `ops.conv_relu` and `ops.conv_input_grad`. stem: the layers with float32 weights beside a half type run
        as `ops.stem_conv`, and where one of them alone reads the image a step of an attack as `ops.stem_step_`."""
        self.module, self.nodes = graph, list(graph.graph.nodes)
        self.one_kernel, self.stem = one_kernel, stem
        # by node: which of its readers comes first, and so last on the way back
        self.first = {n: next(m for m in self.nodes if m in n.users) for n in self.nodes if n.users}
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
    def input_grad(self, x: Tensor, dlogits: DLogits) -> Tensor:
        """As Net.input_grad."""
        gradient = self._back(x, dlogits, 0).take(self.image)
        return torch.zeros_like(x) if gradient is None else gradient.to(x.dtype)

    @torch.no_grad()
    def linf_step_(self, x_adv: Tensor, dlogits: DLogits, x: Tensor, radius: Tensor, step_size: Tensor) -> None:
        """As Net.linf_step_."""
        node, *others = self.image.users
        layer = self.convolutions.get(node)
        if not self.stem or others or layer is None or not layer.splits or len(_operands(node)) > 1:
            ops.linf_step_(x_adv, self.input_grad(x_adv, dlogits), x, radius, step_size)
            return
        # all else that is differentiated comes after it
        gradient = self._back(x_adv, dlogits, 1).take(node)
        if gradient is None:
            gradient = x_adv.new_zeros(1).expand(layer.result_shape(x_adv.shape))
        geometry = (layer.stride[0], layer.padding[0])
        ops.stem_step_(x_adv, gradient, layer.weight, x, radius, step_size, *geometry)

    def _back(self, x: Tensor, dlogits: DLogits, left: int) -> Behind:
        """What has come back when so many nodes are left on the way."""
        logits, tape, behind = self._forward(x)
        behind.add(tape[-1][0], dlogits(logits))
        while len(tape) > left:
            node, backward = tape.pop()
            if (gradient := behind.take(node)) is not None:
                backward(gradient, behind)
        return behind

    @torch.no_grad()
    def _forward(self, x: Tensor) -> tuple[Tensor, list[tuple[fx.Node, Backward]], Behind]:
        values: dict[fx.Node, Any] = {self.image: x}
        tape: list[tuple[fx.Node, Backward]] = []
        behind = Behind()
        for node in self.nodes:
            if node.op == "output":
                return values[_operands(node)[0]], tape, behind
            if node is self.image:
                continue
            layer = self.convolutions.get(node)
            if layer is not None and node in self.active and _alike(layer, node, values):
                values[node], gate = self._convolved(node, layer, values)
                if gate is not None:
                    behind.gates[node] = gate
                tape.append((node, self._turned(node, layer, values[_operands(node)[0]])))
            elif operands := [n for n in node.all_input_nodes if n in self.active and _is_image(values[n])]:
                values[node], backward = self._differentiated(node, operands, values)
                tape.append((node, backward))
            else:
                values[node] = self._call(node, values)
            for operand in self.spent.get(node, ()):
                del values[operand]
        raise AssertionError("a graph ends in its output")

    def _convolved(
        self, node: fx.Node, layer: FoldedConv, values: dict[fx.Node, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's result, and its gate where it ends in a ReLU."""
        image, *skips = _operands(node)
        x = values[image].to(layer.weight.dtype)
        skip = values[skips[0]].to(layer.dtype) if skips else None
        if self.stem and layer.splits and skip is None:
            own = None if node in self.leaving else layer.bias32
            end = (layer.relu, layer.stride[0], layer.padding[0], layer.dtype)
            out, gate = ops.stem_conv(x, layer.weight, own, *end)
            return out, gate if layer.relu else None
        if not layer.relu:
            return layer.convolved(x, None if layer in self.leaving else layer.bias, skip), None
        bias = self.left[node][1] if node in self.left else layer.bias32
        if bias is None:
            bias = torch.zeros(layer.weight.shape[0], device=x.device)
        if self.one_kernel and layer.simple:
            return ops.conv_relu(x, layer.weight, bias, skip, layer.stride[0], layer.padding[0])
        out = layer.convolved(x, None, None)
        return out, ops.bias_add_relu_(out, bias, skip)

    def _turned(self, node: fx.Node, layer: FoldedConv, x: Tensor) -> Backward:
        """The layer's way back, which holds no activation."""
        image, *skips = _operands(node)
        shape, dtype = x.shape, x.dtype

        def backward(gradient: Tensor, behind: Behind) -> None:
            for skip in skips:
                if skip in self.active:
                    behind.add(skip, gradient)
            if image not in self.active:
                return
            last = self.first[image] is node and image in behind.gates
            if not (self.one_kernel and layer.simple):
                behind.add(image, layer.input_grad(gradient, shape).to(dtype))
                return
            other, gate = (behind.sum(image), behind.gates.pop(image)) if last else (None, None)
            geometry = (layer.stride[0], layer.padding[0], *shape[2:])
            found = ops.conv_input_grad(gradient, layer.weight, other, gate, *geometry)
            if last:
                behind.passed[image] = found
            else:
                behind.add(image, found.to(dtype))

        return backward

    def _differentiated(
        self, node: fx.Node, operands: list[fx.Node], values: dict[fx.Node, Any]
    ) -> tuple[Any, Backward]:
        """Any operation, by autograd; one that gives no tensor, such as a size, has no gradient."""
        leaves = {n: values[n].detach().requires_grad_() for n in operands}
        with torch.enable_grad():
            out = self._call(node, {**values, **leaves})

        def backward(gradient: Tensor, behind: Behind) -> None:
            found = torch.autograd.grad(out, list(leaves.values()), gradient, allow_unused=True)
            for operand, of_operand in zip(operands, found, strict=True):
                if of_operand is not None:
                    behind.add(operand, of_operand)

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
