"""The embedded data set: scikit-learn's 8x8 digits. Trains in a minute on two CPU cores.

The radius is four times that of CIFAR-10: digits are easy, and attacks should have something to do.
"""

from __future__ import annotations

from fractions import Fraction

from mwpb_fast.config import Config, EvaluationConfig, OptimConfig
from mwpb_fast.data import dataset
from mwpb_fast.recipes._paper import AT, MART, TRADES, Setting

EPS = Fraction(32, 255)
SETTING = Setting(
    data=dataset.Config(name="digits", validation=0.1, batch_size=64, pad=1, flip=False),
    model="smallresnet-16",
    optim=OptimConfig(lr=0.05, drops=(20, 26)),
    evaluation=EvaluationConfig(attacks=("natural", "pgd20", "cw20", "aa"), eps=EPS, step_size=EPS / 8),
    eps=EPS,
    epochs=30,
    warmup_epochs=20,
)


def at() -> Config:
    """Plain AT: radius 32/255 in every epoch, uniform start."""
    return SETTING.plain(AT, start="uniform")


def control_at() -> Config:
    """AT in two phases, 16/255 then 32/255: MWPB-AT with alpha = 0."""
    return SETTING.two_phase(AT, alpha=0.0)


def mwpb_at() -> Config:
    """MWPB-AT, alpha = 0.58."""
    return SETTING.two_phase(AT, alpha=0.58)


def trades() -> Config:
    """Plain TRADES, beta = 6: radius 32/255 in every epoch."""
    return SETTING.plain(TRADES)


def control_trades() -> Config:
    """TRADES in two phases, 16/255 then 32/255: MWPB-TRADES with alpha = 0."""
    return SETTING.two_phase(TRADES, alpha=0.0)


def mwpb_trades() -> Config:
    """MWPB-TRADES, beta = 6, alpha = 0.42."""
    return SETTING.two_phase(TRADES, alpha=0.42)


def mart() -> Config:
    """Plain MART, beta = 5: radius 32/255 in every epoch."""
    return SETTING.plain(MART)


def control_mart() -> Config:
    """MART in two phases, 16/255 then 32/255: MWPB-MART with alpha = 0."""
    return SETTING.two_phase(MART, alpha=0.0)


def mwpb_mart() -> Config:
    """MWPB-MART, beta = 5, alpha = 0.55."""
    return SETTING.two_phase(MART, alpha=0.55)
