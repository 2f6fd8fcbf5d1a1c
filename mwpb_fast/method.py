"""A method is a point on four axes: budget x attack x objective x weight perturbation.

Each axis is a type here, with everything that a module of it may say of itself; what it does not say has the
default that stands here. Budget, Attack, Objective and Perturbation are what computes; BudgetConfig and so on are
the options that build it, with what must be known before anything heavy is imported. A module inherits from both.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# An attack's loss, as inner(logits, clean, y) -> the gradient at the logits of its sum over the batch. clean: the
# logits of the natural images, None where no loss asks for them.
Inner = Callable[["Tensor", "Tensor | None", "Tensor"], "Tensor"]
DLogits = Callable[["Tensor"], "Tensor"]  # an Inner of one batch: only the logits are missing

# What an attack saw on its way, by name, (B, ...) each; an objective may ask for it. The name "radius" stands
# for the radii of an attack that finds them itself.
Notes = dict[str, "Tensor"]


class Batch(NamedTuple):
    """x: (B, C, H, W) float32, channels-last, in [0, 1]. y: (B,) int64. index: (B,) int64 in the split."""

    x: Tensor
    y: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nothing needs


class Net(Protocol):
    """What attacks ask of a model; images are float32 (B, C, H, W) in [0, 1]."""

    def logits(self, x: Tensor) -> Tensor:
        """(B, classes), without a graph."""

    def input_grad(self, x: Tensor, dlogits: DLogits) -> Tensor:
        """Gradient with respect to x, like x, of the loss whose gradient at the logits is dlogits(logits)."""

    def linf_step_(self, x_adv: Tensor, dlogits: DLogits, x: Tensor, radius: Tensor, step_size: Tensor) -> None:
        """`ops.linf_step_` in place along `input_grad` at x_adv. radius, step_size: (B,). A net that need not
        store the gradient for that has its own."""
        import mwpb_kernels as ops  # heavy

        ops.linf_step_(x_adv, self.input_grad(x_adv, dlogits), x, radius, step_size)

    def refresh(self) -> None:
        """Follow the model's weights as they are now; to be called after every change of them."""


# the axes --------------------------------------------------------------------------------------------------------
class Axis(Protocol):
    """What every axis may say of itself. memory: what it keeps between steps, by name, a row for each training
    image; saved with the run. uncapturable: why no CUDA graph can hold it, where that is so."""

    memory: Mapping[str, Tensor] = MappingProxyType({})
    uncapturable: str = ""

    def remember(self, count: int, device: torch.device) -> None:
        """Make room in `memory` for `count` training images; called once, before the first step."""
        return None


class Budget(Axis, Protocol):
    """uses_logits: whether it looks at the logits, which else may be None."""

    uses_logits: bool = True

    @abstractmethod
    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """The radius of each sample, (B,) float32, detached. logits: (B, classes), natural. y: (B,) int64."""


class Attack(Axis, Protocol):
    @abstractmethod
    def __call__(
        self,
        net: Net,
        batch: Batch,
        clean: Tensor | None,
        radius: Tensor,
        inner: Inner,
        key: Tensor,
        notes: Notes | None = None,
    ) -> Tensor:
        """The adversarial images, a new tensor like batch.x, in each sample's ball and in [0, 1].

        clean: the natural images' logits, (B, classes), or None. radius: (B,) float32. inner: the loss to ascend.
        key: one-element int64 tensor, the seed of all noise. notes: takes what the attack notes.
        """

    def in_epoch(self, epoch: int) -> Attack:
        """What serves in the `epoch`th epoch, counted from 1: the same, or an equal one, throughout a phase."""
        return self


class Objective(Axis, Protocol):
    """uses_clean: whether `inner` looks at the natural logits, which else may be None. sends_natural: whether
    `outer` sends the natural images through the model too, so that they move its running statistics."""

    sends_natural: bool = False

    @property
    def uses_clean(self) -> bool:
        return False

    @property
    @abstractmethod
    def inner(self) -> Inner:
        """What the attack ascends."""

    @abstractmethod
    def outer(
        self, model: torch.nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, notes: Notes | None = None
    ) -> Tensor:
        """Scalar loss to descend; model in train mode. x, x_adv: (B, C, H, W). y: (B,) int64."""

    def in_epoch(self, epoch: int) -> Objective:
        """As an attack's."""
        return self


class Perturbation(Axis, Protocol):
    @abstractmethod
    def __call__(self, model: torch.nn.Module, loss: Callable[[], Tensor]) -> AbstractContextManager[None]:
        """A block in which the weights stand elsewhere. model: in train mode. loss: the outer loss at the weights
        as they are, a scalar."""

    def in_epoch(self, epoch: int) -> Perturbation:
        """As an attack's."""
        return self


# their options ---------------------------------------------------------------------------------------------------
class BudgetConfig(Protocol):
    """eps: the base radius, where there is one; another budget that takes this one's place takes it over.
    earlier: options that came later and whose default is another than what was done before: name -> what was."""

    earlier: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @property
    def eps(self) -> Fraction | None:
        return None

    @abstractmethod
    def build(self) -> Budget: ...


class AttackConfig(Protocol):
    """gives: names of the notes that the attack makes. norm: of the balls, linf or l2. step_size: where it is
    fixed. own_loss: it ascends a loss of its own, and serves only objectives that need its notes. own_radius: it
    finds every sample's radius itself."""

    own_loss: ClassVar[bool] = False
    own_radius: ClassVar[bool] = False

    @property
    def gives(self) -> frozenset[str]:
        return frozenset()

    @property
    def norm(self) -> str:
        return "linf"

    @property
    def step_size(self) -> Fraction | None:
        return None

    @abstractmethod
    def build(self) -> Attack: ...


class ObjectiveConfig(Protocol):
    """needs: names of the notes of the attack that the loss asks for."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    @abstractmethod
    def build(self) -> Objective: ...


class PerturbationConfig(Protocol):
    @abstractmethod
    def build(self) -> Perturbation: ...


# by the folder of an axis' modules
CONFIGS: dict[str, type] = {
    "budgets": BudgetConfig,
    "attacks": AttackConfig,
    "objectives": ObjectiveConfig,
    "perturbations": PerturbationConfig,
}


# the point -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """One point. warmup: the budget of the first `warmup_epochs` epochs.

    Two methods are equal if they are known to compute the same: their axes are the same objects, or equal ones
    that hold nothing but values.
    """

    budget: Budget
    attack: Attack
    objective: Objective
    perturb: Perturbation
    warmup: Budget | None = None
    warmup_epochs: int = 0

    @classmethod
    def build(cls, config: Any) -> Method:
        """config: a run's `mwpb_fast.config.Config`. Raises TypeError, one line, where a module lacks a part."""
        return cls(
            budget=_built(config.budget, Budget),
            attack=_built(config.attack, Attack),
            objective=_built(config.objective, Objective),
            perturb=_built(config.perturbation, Perturbation),
            warmup=_built(config.warmup, Budget),
            warmup_epochs=config.warmup_epochs,
        )

    def in_epoch(self, epoch: int) -> Method:
        """The method as it is in the `epoch`th epoch, counted from 1; equal throughout a phase."""
        return Method(
            budget=self.warmup if self.warmup is not None and epoch <= self.warmup_epochs else self.budget,
            attack=self.attack.in_epoch(epoch),
            objective=self.objective.in_epoch(epoch),
            perturb=self.perturb.in_epoch(epoch),
        )

    @property
    def axes(self) -> dict[str, Axis]:
        """By the names under which a checkpoint holds their memory."""
        own: dict[str, Axis] = {n: getattr(self, n) for n in ("budget", "attack", "objective", "perturb")}
        return own if self.warmup is None else {**own, "warmup": self.warmup}

    @property
    def uses_clean(self) -> bool:
        """Whether the logits of the natural images are asked for."""
        return self.budget.uses_logits or self.objective.uses_clean

    def remember(self, count: int, device: torch.device) -> None:
        """Make room for what the axes keep of each of `count` training images."""
        for axis in self.axes.values():
            axis.remember(count, device)

    @property
    def memory(self) -> dict[str, Mapping[str, Tensor]]:
        """What the axes keep between steps, of those that keep something."""
        return {name: axis.memory for name, axis in self.axes.items() if axis.memory}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Method):
            return NotImplemented
        mine, theirs = self.axes, other.axes
        same = self.warmup_epochs == other.warmup_epochs and mine.keys() == theirs.keys()
        return same and all(_same(axis, theirs[name]) for name, axis in mine.items())


def lacking(part: object, kind: type) -> str:
    """What `part` does not have of an axis, or of its options, and the cure; nothing where it has everything."""
    own = [name for name in dir(kind) if name == "__call__" or not name.startswith("_")]
    missing = [name for name in own if not hasattr(part, name)]
    where = f"{type(part).__module__}.{type(part).__qualname__}"
    cure = f"inherit from mwpb_fast.method.{kind.__name__}, which has the defaults"
    return f"{where} has no {', '.join(missing)}: {cure}" if missing else ""


def _built(config: Any, kind: type) -> Any:
    part = config.build()
    if lack := lacking(part, kind):
        raise TypeError(lack)
    return part


def _same(one: object, other: object) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    try:  # the hash of a tensor is its identity, so equal hashes leave no tensors to compare
        if hash(one) != hash(other) or not is_dataclass(one):
            return hash(one) == hash(other) and bool(one == other)
        # since Python 3.13 a dataclass compares even what is the same, and a tensor gives no answer to that
        return all(_same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one) if f.compare)
    except TypeError:  # it holds something that may change
        return False
