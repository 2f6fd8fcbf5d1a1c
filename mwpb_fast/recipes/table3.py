"""Table 3: SVHN, ResNet-18.

No augmentation: a mirrored digit is no digit, and the field's SVHN code (AWP, ST-AT) has none. The paper
attacks SVHN with 100 steps of PGD, although the table's column is headed PGD-20.
"""

from __future__ import annotations

from mwpb_fast.config import Config, EvaluationConfig, OptimConfig
from mwpb_fast.data import dataset
from mwpb_fast.recipes._paper import AT, MART, TRADES, Setting

SETTING = Setting(
    data=dataset.Config(name="svhn", pad=0, flip=False),
    model="resnet-18",
    optim=OptimConfig(lr=0.01, weight_decay=3.5e-3),
    evaluation=EvaluationConfig(attacks=("natural", "pgd100", "cw20", "aa")),
)


def at() -> Config:
    """Plain AT: radius 8/255 in every epoch, uniform start."""
    return SETTING.plain(AT, start="uniform")


def control_at() -> Config:
    """AT in two phases, 4/255 then 8/255: MWPB-AT with alpha = 0."""
    return SETTING.two_phase(AT, alpha=0.0)


def mwpb_at() -> Config:
    """MWPB-AT, alpha = 0.5."""
    return SETTING.two_phase(AT, alpha=0.5)


def trades() -> Config:
    """Plain TRADES, beta = 6: radius 8/255 in every epoch."""
    return SETTING.plain(TRADES)


def control_trades() -> Config:
    """TRADES in two phases, 4/255 then 8/255: MWPB-TRADES with alpha = 0."""
    return SETTING.two_phase(TRADES, alpha=0.0)


def mwpb_trades() -> Config:
    """MWPB-TRADES, beta = 6, alpha = 0.15."""
    return SETTING.two_phase(TRADES, alpha=0.15)


def mart() -> Config:
    """Plain MART, beta = 5: radius 8/255 in every epoch."""
    return SETTING.plain(MART)


def control_mart() -> Config:
    """MART in two phases, 4/255 then 8/255: MWPB-MART with alpha = 0."""
    return SETTING.two_phase(MART, alpha=0.0)


def mwpb_mart() -> Config:
    """MWPB-MART, beta = 5, alpha = 0.6."""
    return SETTING.two_phase(MART, alpha=0.6)
