"""Table 2: CIFAR-10, WRN-34-10."""

from __future__ import annotations

from mwpb_fast.config import EvaluationConfig, OptimConfig
from mwpb_fast.data import dataset
from mwpb_fast.recipes._paper import AT, MART_WRN, TRADES, Setting

SETTING = Setting(
    table=__name__,
    data=dataset.Config(name="cifar10"),
    model="wrn-34-10",
    optim=OptimConfig(lr=0.1, weight_decay=5e-4),
    evaluation=EvaluationConfig(attacks=("natural", "pgd20", "cw20", "aa")),
)

at, control_at, mwpb_at = SETTING.rows("AT", AT, alpha=0.58, start="uniform")
trades, control_trades, mwpb_trades = SETTING.rows("TRADES", TRADES, alpha=0.42)
mart, control_mart, mwpb_mart = SETTING.rows("MART", MART_WRN, alpha=0.55)
