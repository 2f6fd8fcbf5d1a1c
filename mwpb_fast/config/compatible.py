"""Which axes fit together."""

from __future__ import annotations

from fractions import Fraction

from mwpb_fast.config.radius import check_linf
from mwpb_fast.config.registry import axis_name
from mwpb_fast.config.schema import Config, ConfigError


def check_axes(config: Config) -> None:
    """Refuse, with the reason, axes that do not fit together, and linf radii above 1. Raises ConfigError.

    What the `Config` of an axis may say of itself stands in `mwpb_fast.method`.
    """
    _check_radii(config)
    attack, objective = config.attack, config.objective
    names = {"attack": axis_name("attacks", attack), "objective": axis_name("objectives", objective)}
    if missing := sorted(objective.needs - attack.gives):
        raise ConfigError(
            f"objective {names['objective']} needs {', '.join(missing)} of the attack, which attack "
            f"{names['attack']} does not give as it is set"
        )
    if attack.own_loss and not objective.needs & attack.gives:
        raise ConfigError(
            f"attack {names['attack']} ascends a loss of its own, which objective {names['objective']} does not "
            "descend"
        )
    if config.natural_pass and objective.build().sends_natural:
        raise ConfigError(
            f"natural_pass: objective {names['objective']} sends the natural images through the model already; "
            "take natural_pass=false"
        )
    if attack.own_radius and config.budget.build().uses_logits:
        raise ConfigError(
            f"attack {names['attack']} finds every sample's radius itself, so it cannot follow budget "
            f"{axis_name('budgets', config.budget)}: take budget fixed"
        )


def _check_radii(config: Config) -> None:
    if config.attack.norm != "linf":
        return
    radii = {"warmup.eps": config.warmup.eps, "budget.eps": config.budget.eps}
    for option, value in (radii | {"attack.step_size": config.attack.step_size}).items():
        try:
            check_linf(option, value or Fraction(0))
        except ValueError as error:
            raise ConfigError(str(error)) from error
