"""Table 3: SVHN, ResNet-18.

No augmentation: a mirrored digit is no digit, and the field's SVHN code (AWP, ST-AT) has none. The paper
attacks SVHN with 100 steps of PGD, although the table's column is headed PGD-20.
"""

from __future__ import annotations

from mwpb_fast.config import EvaluationConfig, OptimConfig
from mwpb_fast.data import dataset
from mwpb_fast.recipes._paper import AT, MART, TRADES, Setting

SETTING = Setting(
    table=__name__,
    data=dataset.Config(name="svhn", pad=0, flip=False),
    model="resnet-18",
    optim=OptimConfig(lr=0.01, weight_decay=3.5e-3),
    evaluation=EvaluationConfig(attacks=("natural", "pgd100", "cw20", "aa")),
)

at, control_at, mwpb_at = SETTING.rows("AT", AT, alpha=0.5, start="uniform")
trades, control_trades, mwpb_trades = SETTING.rows("TRADES", TRADES, alpha=0.15)
mart, control_mart, mwpb_mart = SETTING.rows("MART", MART, alpha=0.6)
