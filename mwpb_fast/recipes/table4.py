"""Table 4: Tiny-ImageNet, ResNet-18 with adaptive pooling, 64x64 images, 4 pixels of padding and flips.

The test images have no labels, so the validation images serve as the test split. The paper attacks them with
100 steps of PGD, although the table's column is headed PGD-20.
"""

from __future__ import annotations

from mwpb_fast.config import EvaluationConfig, OptimConfig
from mwpb_fast.data import dataset
from mwpb_fast.recipes._paper import AT, MART, TRADES, Setting

SETTING = Setting(
    table=__name__,
    data=dataset.Config(name="tinyimagenet"),
    model="resnet-18",
    optim=OptimConfig(lr=0.01, weight_decay=3.5e-3),
    evaluation=EvaluationConfig(attacks=("natural", "pgd100", "cw20", "aa")),
)

at, control_at, mwpb_at = SETTING.rows("AT", AT, alpha=0.55, start="uniform")
trades, control_trades, mwpb_trades = SETTING.rows("TRADES", TRADES, alpha=0.4)
mart, control_mart, mwpb_mart = SETTING.rows("MART", MART, alpha=0.7)
