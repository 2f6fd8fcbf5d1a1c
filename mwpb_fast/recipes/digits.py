"""The embedded data set: scikit-learn's 8x8 digits. Trains in a minute on two CPU cores."""

from __future__ import annotations

from fractions import Fraction

from mwpb_fast.attacks import pgd
from mwpb_fast.budgets import fixed, margin
from mwpb_fast.config import Config, EvaluationConfig, ModelConfig, OptimConfig
from mwpb_fast.data import dataset
from mwpb_fast.objectives import at
from mwpb_fast.perturbations import none

EPS = Fraction(32, 255)


def mwpb_at() -> Config:
    """MWPB-AT on digits: two thirds of the epochs at half the radius, then margin-weighted."""
    return Config(
        recipe="digits.mwpb_at",
        data=dataset.Config(name="digits", validation=0.1, batch_size=64, pad=1, flip=False),
        model=ModelConfig(name="smallresnet-16"),
        warmup=fixed.Config(eps=EPS / 2),
        budget=margin.Config(eps=EPS, alpha=0.58),
        attack=pgd.Config(),
        objective=at.Config(),
        perturbation=none.Config(),
        optim=OptimConfig(lr=0.05, drops=(20, 26)),
        evaluation=EvaluationConfig(
            attacks=("natural", "pgd20", "cw20", "aa"), eps=EPS, step_size=EPS / 8
        ),
        epochs=30,
        warmup_epochs=20,
    )
