"""Somebody else's model, which knows nothing of this project, attacked; beside the same attacks by hand."""

from fractions import Fraction

import plain
import torch
from beside import DEVICE, SMALL, beside, digits, same
from torch import Tensor, nn

from mwpb_fast.config import EvaluationConfig
from mwpb_fast.evaluation.evaluate import evaluate
from mwpb_fast.evaluation.score import format_table

EPS = 32 / 255
ATTACKS = ("natural", "fgsm", "pgd20")  # aa, with the extra `eval`, is AutoAttack
SETTINGS = EvaluationConfig(attacks=ATTACKS, eps=Fraction(32, 255), step_size=Fraction(8, 255))


class Theirs(nn.Module):
    """Normalisation is a part of the model: images come in [0, 1], and radii are of those."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x - 0.3) / 0.37)


torch.manual_seed(0)
model, (x, y) = Theirs().to(DEVICE), digits(1600)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(60):  # as its authors would: no adversary in sight
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[1000:]), y[1000:]).backward()
    optimizer.step()
x, y = (x[:100], y[:100]) if SMALL else (x[:1000], y[:1000])


def by_hand() -> Tensor:
    radius = torch.full(y.shape, EPS, device=DEVICE)
    x_adv = (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    gradient = torch.func.grad(lambda x: nn.functional.cross_entropy(model(x), y))
    for _ in range(20):
        x_adv = plain.linf_step(x_adv, gradient(x_adv), x, radius)
    return torch.tensor([accuracy(at) for at in (x, (x + EPS * gradient(x).sign()).clamp(0, 1), x_adv)])


def accuracy(x: Tensor) -> float:
    return 100 * (model(x).argmax(1) == y).double().mean().item()


# a loader of images and labels may stand in the place of (x, y)
theirs, result = beside(
    {"by hand": by_hand, "evaluate": lambda: evaluate(model.eval(), (x, y), SETTINGS)}, rounds=5
)
print(format_table(result))
found = torch.tensor([entry["accuracy"] for entry in result["attacks"].values()])
same(theirs, found, within=2.0)  # in percent; the random starts are not the same
