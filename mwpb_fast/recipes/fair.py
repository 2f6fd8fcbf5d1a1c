"""Is it the margin, or just a larger ball? Four classes of CIFAR-10 and a small ResNet, for a CPU.

On so few classes it comes to have positive margins, so that MWPB's radii differ from its control's. Half of the
epochs, not 30 of 110, have radii of their own: 30 of 110 would be a few hundred steps.
"""

from __future__ import annotations

from mwpb_fast.config import EvaluationConfig, OptimConfig
from mwpb_fast.data import dataset
from mwpb_fast.recipes._paper import Setting

SETTING = Setting(
    table=__name__,
    data=dataset.Config(name="cifar4", subset=4000),
    model="smallresnet-16",
    optim=OptimConfig(lr=0.1, weight_decay=5e-4, drops=(8, 14)),
    evaluation=EvaluationConfig(attacks=("natural", "pgd20", "cw20"), validate_every=2),
    epochs=16,
    warmup_epochs=8,
)

at, control, mwpb, equal, rescaled = SETTING.fair(alpha=0.58)
