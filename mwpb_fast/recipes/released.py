"""CIFAR-10 as the authors of MWPB released it, WRN-34-10; the same on ResNet-18.

It departs from the paper in eps 0.031, alpha 0.52, 120 epochs with other drops, a step of 0.0035 in the warm-up, a
natural pass before the adversarial one, and gradients clipped to norm 1. The best epoch is chosen on held-out
training images here, not on the test set.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction

from mwpb_fast.budgets import deviation
from mwpb_fast.config import EvaluationConfig, OptimConfig
from mwpb_fast.recipes import table2
from mwpb_fast.recipes._paper import AT, Setting

EPS, ALPHA = Fraction(31, 1000), 0.52
SETTING = Setting(
    table=__name__,
    data=table2.SETTING.data,
    model="wrn-34-10",
    optim=OptimConfig(lr=0.1, weight_decay=5e-4, drops=(75, 90, 100), clip_norm=1.0),
    evaluation=EvaluationConfig(attacks=("natural", "pgd20", "cw20", "aa"), eps=EPS, step_size=Fraction(3, 1000)),
    eps=EPS,
    epochs=120,
    natural_pass=True,
    first_step=Fraction(35, 10000),
)
NARROW = dataclasses.replace(SETTING, model="resnet-18")
DEVIATION = deviation.Config(eps=EPS, alpha=ALPHA)

at, control_at, mwpb_at = SETTING.rows("AT", AT, alpha=ALPHA)
sdwpb_at = SETTING.own("SDWPB-AT: the deviation budget, alpha = 0.52.", DEVIATION)
at_resnet18, control_at_resnet18, mwpb_at_resnet18 = NARROW.rows("AT on ResNet-18", AT, alpha=ALPHA)
sdwpb_at_resnet18 = NARROW.own("SDWPB-AT on ResNet-18, alpha = 0.52.", DEVIATION)
