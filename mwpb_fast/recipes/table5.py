"""Table 5: other methods beside MWPB, CIFAR-10, WRN-34-10.

The paper trains them with its own learning rate, batch size and weight decay and with the authors' other
hyper-parameters; 110 epochs are taken for all. What else the authors' code has of its own (padding,
normalisation, schedules) is not taken over: the rows differ in their methods only. Batch normalisation during
the attack is as each method's authors have it; it is in eval mode for MWPB and the controls.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from mwpb_fast.attacks import adaptive, anpgd, pgd, squeeze
from mwpb_fast.budgets import fixed
from mwpb_fast.config import Config, EvaluationConfig
from mwpb_fast.objectives import gairat as gairat_objective
from mwpb_fast.objectives import mail as mail_objective
from mwpb_fast.objectives import mma as mma_objective
from mwpb_fast.objectives import st as st_objective
from mwpb_fast.objectives import wat as wat_objective
from mwpb_fast.perturbations import awp as awp_perturbation
from mwpb_fast.recipes import table2
from mwpb_fast.recipes._paper import AT

SETTING = replace(
    table2.SETTING, table=__name__, evaluation=EvaluationConfig(attacks=("natural", "pgd20", "cw20", "aa", "spsa"))
)
AWP = awp_perturbation.Config(gamma=0.01)  # the AT form's
# The paper does not give it. Of the authors' 12, 20 and 32 the first cannot have made the mean radius of Table 6,
# which is 12/255, where four in ten images fall to PGD within 8/255; 32 is the example of their README.
MMA_MARGIN = Fraction(32, 255)


def mma() -> Config:
    """MMA, d_max = 32/255, natural loss weighted 1/3."""
    return replace(
        SETTING.plain(mma_objective.Config()), attack=anpgd.Config(), budget=fixed.Config(eps=MMA_MARGIN)
    )


def wat() -> Config:
    """WAT on AT, alpha = 0.5; uniform start, attack in train mode."""
    return replace(SETTING.plain(wat_objective.Config(base="at", alpha=0.5), start="uniform"), attack_mode="train")


def mail() -> Config:
    """MAIL on AT, bias -0.5, slope 10; unweighted until the first drop of the learning rate."""
    return SETTING.plain(mail_objective.Config(base="at", bias=-0.5, slope=10.0))


def gairat() -> Config:
    """GAIRAT on AT, Lambda = -1; unweighted in the first half; uniform start."""
    return replace(
        SETTING.plain(gairat_objective.Config(base="at", Lambda=-1.0)),
        attack=pgd.Config(start="uniform", count_correct=True),
    )


def awp() -> Config:
    """AWP on AT, gamma = 0.01 from the first epoch; uniform start, attack in train mode."""
    return replace(SETTING.plain(AT, start="uniform"), perturbation=AWP, attack_mode="train")


def st() -> Config:
    """ST-AT, beta = 6; attack on batch statistics that leave the running ones alone."""
    return replace(SETTING.plain(st_objective.Config(beta=6.0)), attack=squeeze.Config(), attack_mode="batch")


def iaat() -> Config:
    """IAAT, which the paper cites without numbers: radii grow by 1.9/255; attack in train mode."""
    return replace(SETTING.plain(AT), attack=adaptive.Config(), attack_mode="train")


control_at = SETTING.row("AT", AT, alpha=0.0)
mwpb_at = SETTING.row("AT", AT, alpha=0.58)


def control_awp() -> Config:
    """AWP on AT in two phases, 4/255 then 8/255: MWPB-AWP with alpha = 0."""
    return replace(SETTING.two_phase(AT, alpha=0.0), perturbation=AWP)


def mwpb_awp() -> Config:
    """MWPB-AWP: MWPB-AT with AWP, gamma = 0.01; alpha = 0.58, which the paper does not give."""
    return replace(SETTING.two_phase(AT, alpha=0.58), perturbation=AWP)
