"""Is it the margin, or just a larger ball? Four classes of CIFAR-10 and a small ResNet, for a CPU.

On so few classes it comes to have positive margins, so that MWPB's radii differ from its control's. Half of the
epochs, not 30 of 110, have radii of their own: 30 of 110 would be a few hundred steps.
"""

from __future__ import annotations

import dataclasses

from mwpb_fast.budgets import margin
from mwpb_fast.config import EvaluationConfig, OptimConfig
from mwpb_fast.data import dataset
from mwpb_fast.recipes._paper import AT, Setting

ALPHA = 0.58
SETTING = Setting(
    table=__name__,
    data=dataset.Config(name="cifar4", subset=6000),
    model="smallresnet-16",
    optim=OptimConfig(lr=0.1, weight_decay=5e-4, drops=(10, 18)),
    evaluation=EvaluationConfig(attacks=("natural", "pgd20", "cw20"), validate_every=2),
    epochs=20,
    warmup_epochs=10,
)
MWPB = margin.Config(eps=SETTING.eps, alpha=ALPHA)

at, control, mwpb = SETTING.rows("AT", AT, alpha=ALPHA)
equal = SETTING.own(
    "MWPB-AT with its batch's mean radius for every image: how much radius, not who gets it.",
    dataclasses.replace(MWPB, share="equal"),
)
rescaled = SETTING.own(
    "MWPB-AT with the radii of a batch rescaled to mean 8/255: who gets the radius, not how much.",
    dataclasses.replace(MWPB, share="rescaled"),
)
