"""Is it the margin, or just a larger ball? The same rows as `fair` on 8x8 digits, where ten seeds take an hour."""

from __future__ import annotations

import dataclasses

from mwpb_fast.recipes import digits
from mwpb_fast.recipes._paper import Setting

SETTING: Setting = dataclasses.replace(
    digits.SETTING,
    table=__name__,
    evaluation=dataclasses.replace(digits.SETTING.evaluation, attacks=("natural", "pgd20", "cw20")),
)

at, control, mwpb, equal, rescaled = SETTING.fair(alpha=0.58)
