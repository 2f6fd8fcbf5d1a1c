"""Table 8: MWPB-AT over alpha, CIFAR-10, WRN-34-10."""

from __future__ import annotations

import dataclasses

from mwpb_fast.config import Config, EvaluationConfig
from mwpb_fast.recipes import table2
from mwpb_fast.recipes._paper import AT

SETTING = dataclasses.replace(table2.SETTING, evaluation=EvaluationConfig(attacks=("natural", "pgd20", "aa")))


def alpha_000() -> Config:
    """AT in two phases, 4/255 then 8/255: MWPB-AT with alpha = 0."""
    return SETTING.two_phase(AT, alpha=0.0)


def alpha_010() -> Config:
    """MWPB-AT, alpha = 0.10."""
    return SETTING.two_phase(AT, alpha=0.1)


def alpha_020() -> Config:
    """MWPB-AT, alpha = 0.20."""
    return SETTING.two_phase(AT, alpha=0.2)


def alpha_030() -> Config:
    """MWPB-AT, alpha = 0.30."""
    return SETTING.two_phase(AT, alpha=0.3)


def alpha_040() -> Config:
    """MWPB-AT, alpha = 0.40."""
    return SETTING.two_phase(AT, alpha=0.4)


def alpha_050() -> Config:
    """MWPB-AT, alpha = 0.50."""
    return SETTING.two_phase(AT, alpha=0.5)


def alpha_058() -> Config:
    """MWPB-AT, alpha = 0.58: the row of Tables 2 and 5."""
    return SETTING.two_phase(AT, alpha=0.58)


def alpha_070() -> Config:
    """MWPB-AT, alpha = 0.70."""
    return SETTING.two_phase(AT, alpha=0.7)


def alpha_085() -> Config:
    """MWPB-AT, alpha = 0.85."""
    return SETTING.two_phase(AT, alpha=0.85)


def alpha_120() -> Config:
    """MWPB-AT, alpha = 1.20."""
    return SETTING.two_phase(AT, alpha=1.2)
