"""What a trust report measures besides the named attacks, in the form of attacks, so that it is sharded alike."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mwpb_fast.engine.net import EagerNet
from mwpb_fast.evaluation.accuracy import correct
from mwpb_fast.evaluation.catalog import descent
from mwpb_fast.evaluation.contract import AttackSetting, EvaluationAttack, Outcome
from mwpb_fast.inner_losses import cross_entropy
from mwpb_fast.system.lazy import torch

if TYPE_CHECKING:
    from mwpb_fast.method import Net


def weighted(budget_config: Any, steps: int = 20) -> EvaluationAttack:
    """PGD of so many steps of the setting's size in the radii that a budget gives the natural images; they come
    back as values["radius"]. budget_config: the `Config` of a module of budgets."""
    budget = budget_config.build()

    def radius_of(net: Net, x: torch.Tensor, y: torch.Tensor, setting: AttackSetting) -> torch.Tensor:
        return budget(net.logits(x) if budget.uses_logits else None, y)

    fields = {field.name: str(getattr(budget_config, field.name)) for field in dataclasses.fields(budget_config)}
    parameters = {"budget": type(budget_config).__module__, "steps": steps, **fields}
    attack = descent(steps, cross_entropy, radius_of=radius_of)
    return replace(attack, per_image="weighted", parameters=parameters)


def gradients() -> EvaluationAttack:
    """No attack, but the share of each natural image's numbers whose cross-entropy gradient is exactly zero, as
    values["zero_share"]: 1 where there is no gradient at all."""
    return EvaluationAttack(_gradients, forwards=2, ball=False)


def _gradients(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, setting: AttackSetting
) -> Outcome:
    net, size, shares = EagerNet(model, setting.precision), setting.batch_size, [torch.zeros(0)]
    for images, labels in zip(x.split(size), y.split(size), strict=True):
        gradient = net.input_grad(images, partial(cross_entropy, clean=None, y=labels))
        shares.append((gradient == 0).flatten(1).float().mean(1).cpu())
    flags = correct(net, zip(x.split(size), y.split(size), index.split(size), strict=True))
    return Outcome(flags, values={"zero_share": torch.cat(shares)})
