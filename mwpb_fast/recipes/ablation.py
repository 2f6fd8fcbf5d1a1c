"""What in MWPB does the work? CIFAR-10, ResNet-18, the paper's setting with one thing changed at a time.

The control without the half-radius warm-up is AT itself, AT with it is the control: so all rows have the same
Gaussian start.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction

from mwpb_fast.budgets import fixed, margin
from mwpb_fast.recipes import table1
from mwpb_fast.recipes._paper import AT

ALPHA = 0.58
SETTING = dataclasses.replace(table1.SETTING, table=__name__)
NATURAL = dataclasses.replace(SETTING, natural_pass=True)
CLIPPED = dataclasses.replace(SETTING, optim=dataclasses.replace(SETTING.optim, clip_norm=1.0))
MWPB = margin.Config(eps=SETTING.eps, alpha=ALPHA)

at, control, mwpb = SETTING.rows("AT", AT, alpha=ALPHA)
at_natural, control_natural, mwpb_natural = NATURAL.rows("AT with a natural pass", AT, alpha=ALPHA)
at_clipped, control_clipped, mwpb_clipped = CLIPPED.rows("AT with gradients clipped to norm 1", AT, alpha=ALPHA)
mwpb_from_1 = SETTING.own("MWPB-AT from the first epoch on, without the half-radius warm-up.", MWPB, warmup=False)
rescaled = SETTING.own(
    "MWPB-AT with the radii of a batch rescaled to mean 8/255: who gets the radius, not how much.",
    dataclasses.replace(MWPB, share="rescaled"),
)
equal = SETTING.own(
    "MWPB-AT with its batch's mean radius for every image: how much radius, not who gets it.",
    dataclasses.replace(MWPB, share="equal"),
)
fixed_mean = SETTING.own(
    "AT in two phases, 4/255 then 0.043, the mean radius of MWPB-AT in the paper's Table 6.",
    fixed.Config(eps=Fraction(43, 1000)),
)
reverse = SETTING.own(
    "MWPB-AT with reversed margins: the larger radius for the more vulnerable.",
    dataclasses.replace(MWPB, form="reversed"),
)
reverse_rescaled = SETTING.own(
    "MWPB-AT with reversed margins and the radii of a batch rescaled to mean 8/255.",
    dataclasses.replace(MWPB, form="reversed", share="rescaled"),
)
