"""Table 6: mean radius in training, at the best epoch, CIFAR-10.

The paper does not say of which model. WRN-34-10 is taken, with which the paper trains MMA (Table 5), so that the
runs are those of Tables 2 and 5; `--model resnet-18` asks the same of Table 1's.
"""

from __future__ import annotations

import dataclasses

from mwpb_fast.config import Config, EvaluationConfig
from mwpb_fast.recipes import table2, table5
from mwpb_fast.recipes._paper import AT, MART_WRN, TRADES

SETTING = dataclasses.replace(
    table2.SETTING, table=__name__, evaluation=EvaluationConfig(attacks=("natural", "pgd20"))
)

control_at = SETTING.row("AT", AT, alpha=0.0)
mwpb_at = SETTING.row("AT", AT, alpha=0.58)
mwpb_trades = SETTING.row("TRADES", TRADES, alpha=0.42)
mwpb_mart = SETTING.row("MART", MART_WRN, alpha=0.55)


def mma() -> Config:
    """MMA, d_max = 32/255: the row of Table 5."""
    return dataclasses.replace(table5.mma(), evaluation=SETTING.evaluation)
