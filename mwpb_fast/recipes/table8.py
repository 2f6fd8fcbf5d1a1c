"""Table 8: MWPB-AT over alpha, CIFAR-10, WRN-34-10.

alpha = 0 and alpha = 0.58 are rows of Tables 2 and 5 too.
"""

from __future__ import annotations

import dataclasses

from mwpb_fast.config import EvaluationConfig
from mwpb_fast.recipes import table2
from mwpb_fast.recipes._paper import AT

SETTING = dataclasses.replace(
    table2.SETTING, table=__name__, evaluation=EvaluationConfig(attacks=("natural", "pgd20", "aa"))
)

alpha_000 = SETTING.row("AT", AT, alpha=0.0)
alpha_010 = SETTING.row("AT", AT, alpha=0.1)
alpha_020 = SETTING.row("AT", AT, alpha=0.2)
alpha_030 = SETTING.row("AT", AT, alpha=0.3)
alpha_040 = SETTING.row("AT", AT, alpha=0.4)
alpha_050 = SETTING.row("AT", AT, alpha=0.5)
alpha_058 = SETTING.row("AT", AT, alpha=0.58)
alpha_070 = SETTING.row("AT", AT, alpha=0.7)
alpha_085 = SETTING.row("AT", AT, alpha=0.85)
alpha_120 = SETTING.row("AT", AT, alpha=1.2)
