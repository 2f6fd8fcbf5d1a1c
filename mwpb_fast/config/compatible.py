"""Which axes fit together."""

from __future__ import annotations

from fractions import Fraction

from mwpb_fast.config.radius import check_linf
from mwpb_fast.config.registry import axis_name
from mwpb_fast.config.schema import Config, ConfigError


def check_axes(config: Config) -> None:
    """Refuse, with the reason, axes that do not fit together, and linf radii above 1. Raises ConfigError.

    What the `Config` of an axis may say of itself: an objective's `needs`, the notes of the attack that its loss
    asks for; an attack's `gives`, the notes that it makes, `own_loss`, that it ascends a loss of its own and so
    serves only objectives that need its notes, and `own_radius`, that it finds every sample's radius itself. An
    attack's `norm` is that of the balls; it is linf where there is none.
    """
    _check_radii(config)
    attack, objective = config.attack, config.objective
    names = {"attack": axis_name("attacks", attack), "objective": axis_name("objectives", objective)}
    needs: frozenset[str] = getattr(objective, "needs", frozenset())
    gives: frozenset[str] = getattr(attack, "gives", frozenset())
    if missing := sorted(needs - gives):
        raise ConfigError(
            f"objective {names['objective']} needs {', '.join(missing)} of the attack, which attack "
            f"{names['attack']} does not give as it is set"
        )
    if getattr(attack, "own_loss", False) and not needs & gives:
        raise ConfigError(
            f"attack {names['attack']} ascends a loss of its own, which objective {names['objective']} does not "
            "descend"
        )
    if getattr(attack, "own_radius", False) and config.budget.build().uses_logits:
        raise ConfigError(
            f"attack {names['attack']} finds every sample's radius itself, so it cannot follow budget "
            f"{axis_name('budgets', config.budget)}: take budget fixed"
        )


def _check_radii(config: Config) -> None:
    if getattr(config.attack, "norm", "linf") != "linf":
        return
    for axis in ("warmup", "budget", "attack"):
        for option in ("eps", "step_size"):
            value = getattr(getattr(config, axis), option, None)
            try:
                check_linf(f"{axis}.{option}", value or Fraction(0))
            except ValueError as error:
                raise ConfigError(str(error)) from error
