"""CIFAR-10 in minutes on a CPU: a small ResNet, 5,000 training images, a tenth of the paper's schedule.

For trying things out, for tests, and for `mwpb-fast reproduce small`, whose nine runs take two CPU cores about an
hour; its accuracies say nothing about the paper's. `train` attacks 200 test images, so that AutoAttack, too, takes
minutes; `reproduce` attacks more.
"""

from __future__ import annotations

from mwpb_fast.config import EvaluationConfig, OptimConfig
from mwpb_fast.data import dataset
from mwpb_fast.recipes._paper import AT, MART, TRADES, Setting

SETTING = Setting(
    table=__name__,
    data=dataset.Config(name="cifar10", subset=5000),
    model="smallresnet-16",
    optim=OptimConfig(lr=0.1, weight_decay=5e-4, drops=(8, 9)),
    evaluation=EvaluationConfig(attacks=("natural", "pgd20", "cw20", "aa"), subset=200),
    epochs=11,
    warmup_epochs=8,
)

at, control_at, mwpb_at = SETTING.rows("AT", AT, alpha=0.58, start="uniform")
trades, control_trades, mwpb_trades = SETTING.rows("TRADES", TRADES, alpha=0.42)
mart, control_mart, mwpb_mart = SETTING.rows("MART", MART, alpha=0.55)
