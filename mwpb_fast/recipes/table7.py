"""Table 7: the models of Table 2 under more attacks; trained by the same recipes, they are the same runs.

The paper leaves PGD's step at 6, 10 and 12/255 open: 1/255 as at 8/255, which crosses each of these radii in 20
steps. FAB is the targeted form, alone; Square has 5,000 queries.
"""

from __future__ import annotations

import dataclasses

from mwpb_fast.config import EvaluationConfig
from mwpb_fast.recipes import table2
from mwpb_fast.recipes._paper import AT, MART_WRN, TRADES

PGD = ("pgd20", "pgd20@6/255", "pgd20@10/255", "pgd20@12/255")
SETTING = dataclasses.replace(
    table2.SETTING,
    table=__name__,
    evaluation=EvaluationConfig(attacks=("natural", *PGD, "fab", "square", "spsa", "aa-l2")),
)

at, control_at, mwpb_at = SETTING.rows("AT", AT, alpha=0.58, start="uniform")
trades, control_trades, mwpb_trades = SETTING.rows("TRADES", TRADES, alpha=0.42)
mart, control_mart, mwpb_mart = SETTING.rows("MART", MART_WRN, alpha=0.55)
