"""A traced model rewritten into folded layers, and the fold redone in place from live weights.

Any convolutional model that torch.fx can trace will do; nothing is known of architectures. A batch norm after
a convolution or linear layer goes into its weights, one that follows anything else becomes a scale and a bias;
a residual addition and a ReLU join the convolution before them.
"""

from __future__ import annotations

import operator
from typing import Any

import mwpb_kernels as ops
import torch
import torch.nn.functional as F
from torch import fx, nn

from mwpb_fast.engine.layers import Folded, FoldedConv, FoldedLinear, FoldedNorm
from mwpb_fast.engine.sync_norm import KINDS

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, *KINDS)
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
IN_PLACE = (operator.iadd, torch.relu_, F.relu_, "add_", "relu_")
RELUS = (F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, KINDS) or super().is_leaf_module(module, name)


class UnfoldableError(ValueError):
    """The model cannot be folded; one line that says why."""


def fold(model: nn.Module) -> tuple[fx.GraphModule, list[Folded]]:
    """The eval-mode computation of `model` as a graph of folded layers in float32, not yet filled.

    The model is in eval mode while it is traced (the caller's care) and is not changed. Layers without weights
    are shared with it; everything else is the graph's own. Raises UnfoldableError.
    """
    graph = trace(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    targets: dict[str, Any] = {}
    plain_forms(graph, modules)
    layers = _fold_layers(graph, modules, targets)
    _keep_rest(graph, model, modules, targets)
    for node in graph.nodes:
        if node.op == "output" and isinstance(last := targets.get(node.args[0].target), FoldedLinear):
            last.gives_logits = True
    folded = fx.GraphModule(targets, graph)
    folded.graph.eliminate_dead_code()
    folded.recompile()
    used = {node.target for node in folded.graph.nodes}
    return folded, [layer for name, layer in layers.items() if name in used]


def trace(model: nn.Module) -> fx.Graph:
    """What `model` computes in the mode that it is in. Raises UnfoldableError."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise UnfoldableError(f"{name or 'the model'} has hooks")
    try:
        return _Tracer().trace(model)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise UnfoldableError(f"torch.fx cannot trace it ({type(error).__name__}: {reason})") from error


def plain_forms(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """One form each for ReLU, addition and flattening, whatever way the model writes them."""
    for node in list(graph.nodes):
        module = modules.get(node.target) if node.op == "call_module" else None
        if not node.args and isinstance(operand := node.kwargs.get("input"), fx.Node):
            node.args, node.kwargs = (operand,), {k: v for k, v in node.kwargs.items() if k != "input"}
        asked = (node.kwargs.get("inplace"), *node.args[1:2])
        in_place = node.target in IN_PLACE or any(value is True for value in asked)
        if type(module) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        if type(module) is nn.ReLU:
            in_place, node.op, node.target = module.inplace, "call_function", F.relu
        elif node.op in ("call_function", "call_method") and node.target in RELUS:
            node.op, node.target = "call_function", F.relu
        elif node.op in ("call_function", "call_method") and node.target in ADDITIONS and len(node.args) == 2:
            if node.kwargs:
                continue
            node.op, node.target = "call_function", operator.add
        elif node.op == "call_method" and node.target == "view":
            node.target = "reshape"  # a channels-last tensor cannot be viewed flat
            continue
        else:
            continue
        node.kwargs = {}
        if node.target is F.relu:
            node.args = node.args[:1]
        if in_place and isinstance(node.args[0], fx.Node):
            # Whoever reads the operand later means the result, which was written over it.
            later = set(list(graph.nodes)[list(graph.nodes).index(node) + 1 :])
            for user in list(node.args[0].users):
                if user in later:
                    user.replace_input_with(node.args[0], node)


def _fold_layers(graph: fx.Graph, modules: dict[str, nn.Module], targets: dict[str, Any]) -> dict[str, Folded]:
    """Replace convolutions, linear layers and norms, with what follows them, by calls of folded layers."""
    layers: dict[str, Folded] = {}
    gone: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op != "call_module" or node in gone:
            continue
        module = modules[node.target]
        chain, norm, skip = [node], None, None
        is_conv, is_linear = type(module) is nn.Conv2d, type(module) is nn.Linear
        if not (is_conv or is_linear or type(module) in NORMS):
            continue
        if not is_conv and not is_linear:
            norm = module
        elif (after := only_user(chain[-1])) is not None and type(modules.get(str(after.target))) in NORMS:
            norm = modules[str(after.target)]
            chain.append(after)
        if is_conv and (after := only_user(chain[-1])) is not None and after.target is operator.add:
            others = [a for a in after.args if a is not chain[-1]]
            if len(others) == 1 and isinstance(others[0], fx.Node):
                skip = others[0]
                chain.append(after)
        relu = (after := only_user(chain[-1])) is not None and after.target is F.relu
        if relu:
            assert after is not None
            chain.append(after)
        _check(node.target, module, norm)
        kind = FoldedConv if is_conv else FoldedLinear if is_linear else FoldedNorm
        try:
            layer = kind(str(node.target), None if module is norm else module, norm, relu)  # type: ignore[arg-type]
        except ValueError as error:
            raise UnfoldableError(f"layer {node.target}: {error}") from error
        name = f"folded_{len(layers)}"
        layers[name] = targets[name] = layer
        operands = (node.args[0],) if skip is None else (node.args[0], skip)
        with graph.inserting_before(chain[-1]):
            call = graph.call_module(name, operands)
        chain[-1].replace_all_uses_with(call)
        for old in reversed(chain):
            graph.erase_node(old)
        gone.update(chain)
    return layers


def _check(name: object, module: nn.Module, norm: nn.Module | None) -> None:
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        raise UnfoldableError(f"layer {name}: padding mode {module.padding_mode} is not folded")
    if norm is not None and getattr(norm, "running_mean", None) is None:
        raise UnfoldableError(f"layer {name}: its batch norm keeps no running statistics")


def _keep_rest(graph: fx.Graph, model: nn.Module, modules: dict[str, nn.Module], targets: dict[str, Any]) -> None:
    """What is not folded: modules without weights run as they are, constants are read live, detached."""
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target not in targets:
            module = modules[node.target]
            if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
                raise UnfoldableError(f"layer {node.target}: {type(module).__name__} is not known")
            targets[node.target] = module
        elif node.op == "get_attr":
            value = operator.attrgetter(node.target)(model)
            targets[node.target] = value
            if isinstance(value, nn.Parameter):
                with graph.inserting_after(node):
                    detached = graph.call_method("detach", (node,))
                node.replace_all_uses_with(detached, delete_user_cb=lambda user, own=detached: user is not own)
    (output,) = [node for node in graph.nodes if node.op == "output"]
    if not isinstance(output.args[0], fx.Node):
        raise UnfoldableError("it gives more than one tensor")


def only_user(node: fx.Node) -> fx.Node | None:
    """The one operation that reads this node, once, as its tensor operand."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if list(user.args).count(node) == 1 else None


def at_once(layer: Folded) -> bool:
    """Whether `ops.fold_` makes the layer's weight: of a float32 one and a norm, rounded. On the CPU three passes
    over memory are not what a refresh waits for."""
    source: Any = layer.of[0]
    rounded = layer.weight is not layer.weight32 and layer.scale is not None and layer.weight.is_cuda
    return rounded and source is not None and source.weight.dtype == torch.float32


@torch.no_grad()
def refresh(layers: list[Folded]) -> None:
    """Redo the fold from the weights and statistics as they are now, in float32, then round to each dtype.

    Everything is written in place by multi-tensor operations, without a wait for the device; nothing that
    outlives the call is allocated, so a CUDA graph can hold it. On CUDA, what is rounded is not written in float32
    before.
    """
    sources: list[Any] = [layer.of[0] for layer in layers]
    norms: list[Any] = [layer.of[1] for layer in layers]
    weighted = [(la, s) for la, s in zip(layers, sources, strict=True) if s is not None and not at_once(la)]
    if weighted:
        torch._foreach_copy_([la.weight32 for la, _ in weighted], [s.weight for _, s in weighted])
    normed = [(la, n) for la, n in zip(layers, norms, strict=True) if n is not None]
    if normed:
        scales: list[Any] = [la.scale for la, _ in normed]
        shifts: list[Any] = [la.bias32.flatten() for la, _ in normed]  # type: ignore[union-attr]
        affine = [i for i, (_, n) in enumerate(normed) if n.weight is not None]
        torch._foreach_copy_(scales, [n.running_var for _, n in normed])
        torch._foreach_add_(scales, [n.eps for _, n in normed])
        torch._foreach_rsqrt_(scales)
        torch._foreach_copy_(shifts, [n.running_mean for _, n in normed])
        torch._foreach_neg_(shifts)
        own: list[Any] = [getattr(la.of[0], "bias", None) for la, _ in normed]
        biased = [i for i, bias in enumerate(own) if bias is not None]
        if biased:
            torch._foreach_add_([shifts[i] for i in biased], [own[i] for i in biased])
        if affine:
            torch._foreach_mul_([scales[i] for i in affine], [normed[i][1].weight for i in affine])
        torch._foreach_mul_(shifts, scales)
        if affine:
            torch._foreach_add_([shifts[i] for i in affine], [normed[i][1].bias for i in affine])
        scaled = [la for la, _ in normed if la.of[0] is not None and not at_once(la)]
        if scaled:
            factors = [la.scale.view(-1, *[1] * (la.weight32.dim() - 1)) for la in scaled]  # type: ignore[union-attr]
            torch._foreach_mul_([la.weight32 for la in scaled], factors)
    plain = [(la, s) for la, s in weighted if la.of[1] is None and s.bias is not None]
    if plain:
        torch._foreach_copy_([la.bias32 for la, _ in plain], [s.bias for _, s in plain])  # type: ignore[misc]
    if together := [(la, s) for la, s in zip(layers, sources, strict=True) if at_once(la)]:
        own_scales: list[Any] = [la.scale for la, _ in together]
        ops.fold_([la.weight for la, _ in together], [s.weight for _, s in together], own_scales)
    lowered = [la for la in layers if la.weight is not la.weight32]
    if separate := [la for la in lowered if not at_once(la)]:
        torch._foreach_copy_([la.weight for la in separate], [la.weight32 for la in separate])
    if lowered:
        with_bias: list[Any] = [la for la in lowered if la.bias is not None]
        if with_bias:
            torch._foreach_copy_([la.bias for la in with_bias], [la.bias32 for la in with_bias])
