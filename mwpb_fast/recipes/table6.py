"""Table 6: mean radius in training, at the best epoch, CIFAR-10.

The paper does not say of which model. WRN-34-10 is taken, with which the paper trains MMA (Table 5), so that the
runs are those of Tables 2 and 5; `--model resnet-18` asks the same of Table 1's.
"""

from __future__ import annotations

import dataclasses

from mwpb_fast.config import Config, EvaluationConfig
from mwpb_fast.recipes import table2, table5

EVALUATION = EvaluationConfig(attacks=("natural", "pgd20"))


def _attacked(config: Config) -> Config:
    return dataclasses.replace(config, evaluation=EVALUATION)


def control_at() -> Config:
    """AT in two phases, 4/255 then 8/255: MWPB-AT with alpha = 0."""
    return _attacked(table2.control_at())


def mwpb_at() -> Config:
    """MWPB-AT, alpha = 0.58."""
    return _attacked(table2.mwpb_at())


def mwpb_trades() -> Config:
    """MWPB-TRADES, beta = 6, alpha = 0.42."""
    return _attacked(table2.mwpb_trades())


def mwpb_mart() -> Config:
    """MWPB-MART, beta = 6, alpha = 0.55."""
    return _attacked(table2.mwpb_mart())


def mma() -> Config:
    """MMA, d_max = 32/255: the row of Table 5."""
    return _attacked(table5.mma())
