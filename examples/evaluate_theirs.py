"""Somebody else's model, which knows nothing of this project, and a loader of images: attacked, with intervals."""

import sys
from fractions import Fraction

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mwpb_fast.config import EvaluationConfig
from mwpb_fast.evaluation.evaluate import evaluate
from mwpb_fast.evaluation.score import format_table

COUNT = 100 if "--small" in sys.argv else 1000


class Theirs(nn.Module):
    """Normalisation is a part of the model: images come in [0, 1], and radii are of those."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers((x - 0.3) / 0.37)


torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)

model = Theirs()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(60):  # as its authors would: no adversary in sight
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[1000:]), y[1000:]).backward()
    optimizer.step()
model.eval()

test = DataLoader(TensorDataset(x[:COUNT], y[:COUNT]), batch_size=100)
attacks = ("natural", "fgsm", "pgd20", "cw20")  # aa, with the extra `eval`, is AutoAttack
settings = EvaluationConfig(attacks=attacks, eps=Fraction(32, 255), step_size=Fraction(4, 255))
result = evaluate(model, test, settings)
print(format_table(result))

natural, robust = (result["attacks"][name]["accuracy"] for name in ("natural", "pgd20"))
assert robust < natural
