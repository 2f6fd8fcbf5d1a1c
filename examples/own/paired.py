"""An objective that uses an op: cross-entropy at the adversarial images, and the KL divergence from the natural
ones' probabilities. `--objective own.paired --objective.weight 2`."""

from dataclasses import dataclass

from mwpb_fast.inner_losses import cross_entropy
from mwpb_fast.method import Notes, Objective, ObjectiveConfig
from mwpb_fast.system.lazy import ops, torch


@dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    """weight: of the divergence."""

    weight: float = 1.0

    def build(self) -> "Paired":
        return Paired(self.weight)


@dataclass(frozen=True)
class Paired(Objective):
    """outer: mean_i CE(f(x'_i), y_i) + weight * KL(p(x_i) || p(x'_i)); inner: cross-entropy."""

    weight: float
    sends_natural = True  # `outer` sends the natural images through the model as well
    inner = staticmethod(cross_entropy)

    def outer(
        self,
        model: "torch.nn.Module",
        x: "torch.Tensor",
        x_adv: "torch.Tensor",
        y: "torch.Tensor",
        notes: Notes | None = None,
    ) -> "torch.Tensor":
        natural, adversarial = model(x).float(), model(x_adv).float()
        apart = ops.kl_div(natural, adversarial).mean()
        return torch.nn.functional.cross_entropy(adversarial, y) + self.weight * apart
