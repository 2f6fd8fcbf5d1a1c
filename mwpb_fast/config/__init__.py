"""One run's whole configuration, and how a recipe, a YAML file and the command line make it.

Nothing heavy is imported here.
"""

from mwpb_fast.config.compatible import check_axes
from mwpb_fast.config.registry import all_recipes, axis_config, axis_name, load, names, recipe, recipes_of
from mwpb_fast.config.resolve import blank, from_dict, resolve, to_dict
from mwpb_fast.config.schema import (
    AXES,
    Config,
    ConfigError,
    DistributedConfig,
    EvaluationConfig,
    GuardConfig,
    KeepConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
)

__all__ = [
    "AXES",
    "Config",
    "ConfigError",
    "DistributedConfig",
    "EvaluationConfig",
    "GuardConfig",
    "KeepConfig",
    "ModelConfig",
    "OptimConfig",
    "PrecisionConfig",
    "all_recipes",
    "axis_config",
    "axis_name",
    "blank",
    "check_axes",
    "from_dict",
    "load",
    "names",
    "recipe",
    "recipes_of",
    "resolve",
    "to_dict",
]
