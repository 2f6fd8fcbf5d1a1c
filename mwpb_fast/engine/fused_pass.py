"""The training pass with each batch norm, the residual addition after it and their ReLU in one op.

A traced model is rewritten as for the twin (`fold`), but nothing is copied: layers, parameters and buffers are the
model's own, so optimisers, averages and checkpoints know nothing of it. The running statistics of all layers are
written at once, at the end of the pass.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from mwpb_kernels.batch_norm_relu import norms
from torch import Tensor, fx, nn

from mwpb_fast.engine.fold import UnfoldableError, only_user, plain_forms, trace
from mwpb_fast.engine.made_of import MadeOf
from mwpb_fast.engine.net import module_mode
from mwpb_fast.engine.onednn_fault import protect
from mwpb_fast.engine.precision import full_float32, unmeasured
from mwpb_fast.engine.twin import CHECKED, TOLERANCE, EngineWarning

FUSABLE = (nn.BatchNorm1d, nn.BatchNorm2d)


class FusedNorm(nn.Module):
    """relu(norm(x) + skip) for a batch norm in train mode; new: the running statistics after it, which whoever
    calls it is to write, or None."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.of = (norm,)  # in a tuple, so that the norm is a child of the model alone
        self.new: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        norm: Any = self.of[0]
        alike = skip is None or (skip.shape == x.shape and skip.dtype == x.dtype)
        if not norm.training or not alike or x.numel() < 2 * x.shape[1]:
            out = norm(x)  # which also says what is wrong with one value a channel
            return F.relu(out if skip is None else out + skip)
        running = (norm.running_mean, norm.running_var)
        out, _, _, _, *new = norms(x, norm.weight, norm.bias, *running, skip, norm.momentum, norm.eps)
        self.new = (new[0], new[1]) if norm.track_running_stats else None
        return out


class FusedPass(nn.Module):
    """As `model`, in train mode: (B, C, H, W) -> (B, classes). In eval mode it is the model itself.

    sample: (B, C, H, W) float32 images on the model's device; a few of them are run through both, which must agree
    in logits and in the weights' gradient. Where the model is later no longer what this was made from, it is the
    model itself as well, with a warning. Raises UnfoldableError for a model that cannot be traced, or has nothing
    to fuse.
    """

    def __init__(self, model: nn.Module, sample: Tensor) -> None:
        super().__init__()
        self.model = model
        protect(model)  # gradients of its weights are compared
        self._made_of, self._lost = MadeOf(model), False
        with module_mode(model, training=True):
            graph, self._layers = rewritten(model)
            self._graph = (graph,)  # its layers are the model's children
            with unmeasured(), full_float32():
                self._compare(sample[:CHECKED].detach().float())

    def forward(self, x: Tensor) -> Tensor:
        if not self._lost and self._made_of.differs(set()):
            self._lost = True
            message = "the model has changed since its training pass was fused: it takes the plain one"
            warnings.warn(message, EngineWarning, stacklevel=2)
        if self._lost or not self.model.training:
            result: Tensor = self.model(x)
            return result
        for layer in self._layers:
            layer.new = None
        (graph,) = self._graph
        self._made_of.follow(graph)
        out: Tensor = graph(x)
        self._write()
        return out

    @torch.no_grad()
    def _write(self) -> None:
        """The running statistics that are new."""
        found: list[tuple[Any, tuple[Tensor, Tensor]]] = [(la.of[0], la.new) for la in self._layers if la.new]
        if found:
            kept = [t for norm, _ in found for t in (norm.running_mean, norm.running_var)]
            torch._foreach_copy_(kept, [t for _, new in found for t in new])
            torch._foreach_add_([norm.num_batches_tracked for norm, _ in found], 1)

    def _compare(self, x: Tensor) -> None:
        """Refuse a pass whose logits or gradients are not the model's: its code does what a trace misses."""
        before = [b.clone() for b in self.model.buffers()]
        found = []
        for net in (self.model, self):
            with torch.random.fork_rng([x.device] if x.is_cuda else []):  # both drop the same units
                torch.manual_seed(0)
                try:
                    found.append(_logits_and_gradient(net, self.model, x))
                except Exception as error:  # the model's own code, or its rewritten form, may raise anything
                    reason = (str(error).splitlines() or [type(error).__name__])[0]
                    raise UnfoldableError(f"it cannot be compared with its fused form ({reason})") from error
                finally:
                    with torch.no_grad():
                        for buffer, value in zip(self.model.buffers(), before, strict=True):
                            buffer.copy_(value)
        for name, expected, got in zip(("logits", "gradient"), *found, strict=True):
            close = got.shape == expected.shape and (got - expected).norm() <= TOLERANCE * expected.norm() + 1e-12
            if not close and bool(expected.isfinite().all()):
                raise UnfoldableError(f"fused, it gives another {name}")


def _logits_and_gradient(net: nn.Module, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        logits = net(x).float()
        steps = torch.linspace(-1, 1, logits.shape[-1], device=x.device)
        gradients = torch.autograd.grad((logits * steps).sum(), parameters, allow_unused=True)
    return logits.detach(), torch.cat([g.flatten() for g in gradients if g is not None])


def rewritten(model: nn.Module) -> tuple[fx.GraphModule, list[FusedNorm]]:
    """The computation of `model`, in train mode, over its own modules, with fused layers; these too."""
    graph = trace(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    plain_forms(graph, modules)
    targets: dict[str, Any] = {}
    layers: list[FusedNorm] = []
    called = [modules[node.target] for node in graph.nodes if node.op == "call_module"]
    for node in list(graph.nodes):
        norm = modules[node.target] if node.op == "call_module" else None
        if norm is not None and fusable(norm) and called.count(norm) == 1:
            _fuse(graph, node, norm, targets, layers)
    if not layers:
        raise UnfoldableError("it has no batch norm with a ReLU behind it")
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in targets:
            targets[node.target] = modules[node.target]
        elif node.op == "get_attr":
            targets[node.target] = operator.attrgetter(node.target)(model)
    return fx.GraphModule(targets, graph), layers


def fusable(norm: Any) -> bool:
    """Whether a module is a batch norm as the op has it: with weight and bias, and running statistics that follow
    by a fixed share. A subclass may do something else."""
    if type(norm) not in FUSABLE or norm.weight is None or norm.running_mean is None or norm.momentum is None:
        return False
    kinds = {t.dtype for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)}
    return len(kinds) == 1 and kinds <= {torch.float32, torch.float64}


def _fuse(
    graph: fx.Graph, node: fx.Node, norm: nn.Module, targets: dict[str, Any], layers: list[FusedNorm]
) -> None:
    """Replace the norm, an addition behind it and a ReLU by one call, if there is a ReLU."""
    chain, operands = [node], [node.args[0]]
    after = only_user(node)
    if after is not None and after.target is operator.add:
        others = [a for a in after.args if a is not node]
        if len(others) != 1 or not isinstance(others[0], fx.Node):
            return
        operands.append(others[0])
        chain.append(after)
        after = only_user(after)
    if after is None or after.target is not F.relu or node.kwargs:
        return
    layers.append(FusedNorm(norm))
    name = f"fused_{len(layers)}"
    targets[name] = layers[-1]
    with graph.inserting_before(after):
        call = graph.call_module(name, tuple(operands))
    after.replace_all_uses_with(call)
    for old in (after, *reversed(chain)):
        graph.erase_node(old)
