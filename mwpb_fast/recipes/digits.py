"""The embedded data set: scikit-learn's 8x8 digits. Trains in a minute on two CPU cores.

The radius is four times that of CIFAR-10: digits are easy, and attacks should have something to do.
"""

from __future__ import annotations

from fractions import Fraction

from mwpb_fast.config import EvaluationConfig, OptimConfig
from mwpb_fast.data import dataset
from mwpb_fast.recipes._paper import AT, MART, TRADES, Setting

EPS = Fraction(32, 255)
SETTING = Setting(
    table=__name__,
    data=dataset.Config(name="digits", validation=0.1, batch_size=64, pad=1, flip=False),
    model="smallresnet-16",
    optim=OptimConfig(lr=0.05, drops=(20, 26)),
    evaluation=EvaluationConfig(attacks=("natural", "pgd20", "cw20", "aa"), eps=EPS, step_size=EPS / 8),
    eps=EPS,
    epochs=30,
    warmup_epochs=20,
)

at, control_at, mwpb_at = SETTING.rows("AT", AT, alpha=0.58, start="uniform")
trades, control_trades, mwpb_trades = SETTING.rows("TRADES", TRADES, alpha=0.42)
mart, control_mart, mwpb_mart = SETTING.rows("MART", MART, alpha=0.55)
