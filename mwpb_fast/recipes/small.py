"""CIFAR-10 in minutes on a CPU: a small ResNet, 5,000 training images, a tenth of the paper's schedule.

For trying things out, for tests, and for `mwpb-fast reproduce small`, whose nine runs take two CPU cores about an
hour; its accuracies say nothing about the paper's.
"""

from __future__ import annotations

from mwpb_fast.config import Config, EvaluationConfig, OptimConfig
from mwpb_fast.data import dataset
from mwpb_fast.recipes._paper import AT, MART, TRADES, Setting

SETTING = Setting(
    data=dataset.Config(name="cifar10", subset=5000),
    model="smallresnet-16",
    optim=OptimConfig(lr=0.1, weight_decay=5e-4, drops=(8, 9)),
    evaluation=EvaluationConfig(attacks=("natural", "pgd20", "cw20", "aa"), subset=1000),
    epochs=11,
    warmup_epochs=8,
)


def at() -> Config:
    """Plain AT: radius 8/255 in every epoch, uniform start."""
    return SETTING.plain(AT, start="uniform")


def control_at() -> Config:
    """AT in two phases, 4/255 then 8/255: MWPB-AT with alpha = 0."""
    return SETTING.two_phase(AT, alpha=0.0)


def mwpb_at() -> Config:
    """MWPB-AT, alpha = 0.58."""
    return SETTING.two_phase(AT, alpha=0.58)


def trades() -> Config:
    """Plain TRADES, beta = 6: radius 8/255 in every epoch."""
    return SETTING.plain(TRADES)


def control_trades() -> Config:
    """TRADES in two phases, 4/255 then 8/255: MWPB-TRADES with alpha = 0."""
    return SETTING.two_phase(TRADES, alpha=0.0)


def mwpb_trades() -> Config:
    """MWPB-TRADES, beta = 6, alpha = 0.42."""
    return SETTING.two_phase(TRADES, alpha=0.42)


def mart() -> Config:
    """Plain MART, beta = 5: radius 8/255 in every epoch."""
    return SETTING.plain(MART)


def control_mart() -> Config:
    """MART in two phases, 4/255 then 8/255: MWPB-MART with alpha = 0."""
    return SETTING.two_phase(MART, alpha=0.0)


def mwpb_mart() -> Config:
    """MWPB-MART, beta = 5, alpha = 0.55."""
    return SETTING.two_phase(MART, alpha=0.55)
