"""One run's whole configuration, and how a recipe, a YAML file and the command line make it.

A method is a point in budget x attack x objective x weight perturbation; each of those is the `Config` of one
module, found by the module's name. Nothing heavy is imported here.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import pkgutil
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType
from typing import Any

from mwpb_fast.config.radius import check_linf, parse_radius

AXES = {
    "warmup": "budgets",
    "budget": "budgets",
    "attack": "attacks",
    "objective": "objectives",
    "perturbation": "perturbations",
}


class ConfigError(ValueError):
    """What is wrong with a configuration, in one line."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """name: model file and its numbers, such as resnet-18, preactresnet-18, wrn-34-10, smallresnet-16.
    normalize: put the data set's mean and standard deviation into the model as its first layer."""

    name: str = "resnet-18"
    normalize: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD with the learning rate divided by 10 at the start of each epoch in `drops` (counted from 1).

    ema: decay of an averaged copy of the weights, which is then validated and kept; 0 for none.
    fused: "apex" asks for NVIDIA apex's FusedSGD, "torch" for PyTorch's own fused SGD.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    drops: tuple[int, ...] = (80, 90)
    drop_factor: float = 0.1
    ema: float = 0.0
    fused: str = "torch"

    def __post_init__(self) -> None:
        if not (0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf):
            raise ValueError("lr must be positive and finite, weight_decay must be finite and not negative")
        if not (0 <= self.momentum < 1 and 0 <= self.ema < 1 and 0 < self.drop_factor <= 1):
            raise ValueError("momentum and ema must be in [0, 1), drop_factor in (0, 1]")
        if self.fused not in ("torch", "apex"):
            raise ValueError(f"fused must be torch or apex, not {self.fused}")
        if list(self.drops) != sorted(self.drops) or any(epoch < 1 for epoch in self.drops):
            raise ValueError(f"drops must be rising epochs counted from 1, not {self.drops}")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """device: auto, cpu, cuda or cuda:N. dtype: auto (bf16 on CUDA, fp32 on the CPU), fp32 (not TF32), bf16, fp16.
    attack_dtype: of the attack alone: auto (as dtype), fp32 or bf16.
    engine: what the attack runs on: eager is the model itself, twin a copy with its batch norms folded in, auto
    the twin where that is known to change nothing that counts (float32 on the CPU).
    tune: for each convolution of the twin, time the plain call and those that fuse what follows it, and take the
    fastest; on CUDA cuDNN measures its algorithms, too.
    compile: compile the training pass with torch.compile.
    capture: record the whole step as one CUDA graph for each phase and replay it.
    oracle: fp32, eager, contiguous, reference ops and deterministic algorithms: the truth to compare with."""

    device: str = "auto"
    engine: str = "auto"
    dtype: str = "auto"
    attack_dtype: str = "auto"
    tune: bool = False
    compile: bool = False
    capture: bool = False
    channels_last: bool = True
    oracle: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "fp32", "bf16", "fp16"):
            raise ValueError(f"dtype must be auto, fp32, bf16 or fp16, not {self.dtype}")
        if self.attack_dtype not in ("auto", "fp32", "bf16"):
            raise ValueError(f"attack_dtype must be auto, fp32 or bf16, not {self.attack_dtype}")
        if self.engine not in ("auto", "eager", "twin"):
            raise ValueError(f"engine must be auto, eager or twin, not {self.engine}")
        for dtype in (self.dtype, self.attack_dtype):
            if self.oracle and dtype not in ("auto", "fp32"):
                raise ValueError(f"the oracle computes in fp32, not {dtype}")
        if self.tune and self.engine != "twin":
            raise ValueError("tune chooses among the twin's convolutions: it needs engine=twin")
        if self.oracle and (self.capture or self.compile):
            raise ValueError("the oracle runs eagerly, without capture or compile")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """attacks: of natural, fgsm, pgdN, pgdNxR, cwN, cwNxR, aa, aa-l2, apgd-ce, apgd-t, fab, square, spsa, spsaN; N
    steps (pairs for spsa), R starts; pgd20@6/255 has a radius of its own, aa-l2 has 128/255 by itself. eps,
    step_size: of the others, the latter of pgd and cw, in the units of images in [0, 1]; since these attacks are
    linf, at most 1. subset: attack only so many test images, stratified by class (results are then labelled a
    preview); 0 for all. costly_subset: the same for spsa alone. validate_every: epochs between validations by
    PGD-10."""

    attacks: tuple[str, ...] = ("natural", "pgd20", "cw20")
    eps: Fraction = Fraction(8, 255)
    step_size: Fraction = Fraction(1, 255)
    batch_size: int = 250
    subset: int = 0
    costly_subset: int = 1000
    validate_every: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.subset < 0 or self.costly_subset < 0 or self.validate_every < 1:
            raise ValueError("batch_size and validate_every must be at least 1, subset not negative")
        check_linf("eps", self.eps)
        check_linf("step_size", self.step_size)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run. epochs: in all; the first `warmup_epochs` use the `warmup` budget, the others `budget`.

    attack_mode: how batch normalisation runs while margins and attacks are computed: eval; train; or batch, as
    train but leaving the running statistics alone.
    The axes hold the `Config` of the modules that they name; data is `mwpb_fast.data.dataset.Config`.
    """

    recipe: str
    data: Any
    budget: Any
    attack: Any
    objective: Any
    warmup: Any
    perturbation: Any
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    precision: PrecisionConfig = PrecisionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = 0
    epochs: int = 110
    warmup_epochs: int = 0
    attack_mode: str = "eval"
    max_bad_steps: int = 20

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.warmup_epochs < 0 or self.max_bad_steps < 0:
            raise ValueError("epochs, warmup_epochs and max_bad_steps must not be negative")
        if self.attack_mode not in ("eval", "train", "batch"):
            raise ValueError(f"attack_mode must be eval, train or batch, not {self.attack_mode}")


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


def names(kind: str) -> list[str]:
    """The modules of mwpb_fast.<kind>, sorted."""
    package = importlib.import_module(f"mwpb_fast.{kind}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def load(kind: str, name: str) -> ModuleType:
    """The module `mwpb_fast.<kind>.<name>`, or the one that a dotted `name` gives.

    Raises ConfigError, naming what there is, where it does not exist.
    """
    path = name if "." in name else f"mwpb_fast.{kind}.{name}"
    try:
        found = importlib.util.find_spec(path) is not None
    except (ModuleNotFoundError, ValueError):
        found = False
    if not found:
        raise ConfigError(f"no {name!r} among the {kind}: {', '.join(names(kind))}")
    return importlib.import_module(path)


def axis_config(kind: str, name: str) -> Any:
    """The default `Config` of an axis module. Raises ConfigError where the module has none."""
    module = load(kind, name)
    if not hasattr(module, "Config"):
        raise ConfigError(f"{name!r} is a module of {kind}, but not one of the {kind}: it has no Config")
    return module.Config()


def recipe(name: str) -> Config:
    """The configuration that the recipe `module.function` returns, such as table1.mwpb_at."""
    module_name, _, function = name.rpartition(".")
    module = load("recipes", module_name or name)
    make = module.__dict__.get(function.replace("-", "_")) if module_name else None
    if not callable(make) or function.startswith("_") or getattr(make, "__module__", "") != module.__name__:
        raise ConfigError(f"no recipe {name!r}; {module_name or name} has {', '.join(recipes_of(module))}")
    return dataclasses.replace(make(), recipe=name)


def recipes_of(module: ModuleType) -> list[str]:
    """Names `module.function` of a module's recipes."""
    stem = module.__name__.rsplit(".", 1)[-1]
    return [
        f"{stem}.{name}"
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]


def all_recipes() -> list[str]:
    """Names of every recipe of this package."""
    return [name for stem in names("recipes") for name in recipes_of(load("recipes", stem))]


def axis_name(kind: str, value: Any) -> str:
    """The name under which `load(kind, name)` finds the module of the axis configuration `value`."""
    module = type(value).__module__
    return module.removeprefix(f"mwpb_fast.{kind}.")


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration in plain types, exact: radii as fractions, axes with their names."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Fraction):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    result = plain(config)
    for field, kind in AXES.items():
        result[field] = {"name": axis_name(kind, getattr(config, field)), **result[field]}
    return result


def from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration that `to_dict` wrote. Raises ConfigError for unknown keys and bad values."""
    return resolve(blank(values), [values], [])


def blank(values: Mapping[str, Any]) -> Config:
    """The recipe and the axes of what `to_dict` wrote, with the defaults of all else. Raises ConfigError."""
    missing = {f.name for f in dataclasses.fields(Config)} - set(values)
    if missing:
        raise ConfigError(f"a saved configuration without {', '.join(sorted(missing))}")
    return Config(
        recipe=str(values["recipe"]),
        data=importlib.import_module("mwpb_fast.data.dataset").Config(),
        **{field: _axis(field, values[field]) for field in AXES},
    )


def _axis(field: str, value: Any) -> Any:
    if not isinstance(value, Mapping) or "name" not in value:
        raise ConfigError(f"{field} must say which module of {AXES[field]} it means, as name: ...")
    return axis_config(AXES[field], str(value["name"]))


def resolve(start: Config, files: Iterable[Mapping[str, Any]], arguments: list[str]) -> Config:
    """`start` (a recipe's configuration) overridden by mappings (YAML files) and then by command-line arguments.

    An axis is changed by its module's name: `--objective mart`, or `objective: {name: mart, beta: 6}`; its
    other values then start from that module's defaults, keeping the radius `eps` of the axis it replaces.
    Raises ConfigError, one line, for unknown keys and bad values.
    """
    overrides: list[dict[str, Any]] = []
    for mapping in files:
        override: dict[str, Any] = {}
        for key, value in mapping.items():
            if key in AXES and isinstance(value, Mapping) and "name" in value:
                start = _swap(start, key, str(value["name"]))
                value = {k: v for k, v in value.items() if k != "name"}
            elif key in AXES and isinstance(value, str):
                start, value = _swap(start, key, value), {}
            if value != {}:
                override[key] = value
        overrides.append(override)
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        flag, equals, value = argument.partition("=")
        if flag.removeprefix("--") in AXES and flag.startswith("--"):
            if not equals and not queue:
                raise ConfigError(f"{flag} wants a name")
            start = _swap(start, flag.removeprefix("--"), value if equals else queue.pop(0))
        else:
            rest.append(argument)
    return _parse(start, overrides, rest)


def _swap(start: Config, field: str, name: str) -> Config:
    old = getattr(start, field)
    new = axis_config(AXES[field], name)
    if type(new) is type(old):
        return start
    if hasattr(old, "eps") and hasattr(new, "eps"):
        new = dataclasses.replace(new, eps=old.eps)
    return dataclasses.replace(start, **{field: new})


def _parse(start: Config, overrides: list[dict[str, Any]], arguments: list[str]) -> Config:
    import jsonargparse
    from jsonargparse.typing import register_type

    register_type(Fraction, str, parse_radius, fail_already_registered=False)
    parser = jsonargparse.ArgumentParser(exit_on_error=False, prog="mwpb-fast", add_help=False)
    hints = {f.name: f.type for f in dataclasses.fields(Config)}
    for name in hints:
        value = getattr(start, name)
        if dataclasses.is_dataclass(value):
            _evaluate_annotations(type(value))
        parser.add_argument(f"--{name}", type=type(value), default=value)
    try:
        namespace = parser.get_defaults()
        for override in overrides:
            namespace = parser.parse_object(override, namespace=namespace)
        namespace = parser.parse_args(arguments, namespace=namespace)
        built = parser.instantiate(namespace)
        return Config(**{name: built[name] for name in hints})
    except (jsonargparse.ArgumentError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def _evaluate_annotations(cls: type) -> None:
    # left as strings, jsonargparse evaluates them by running the module's TYPE_CHECKING imports: torch among them
    hints = typing.get_type_hints(cls)
    vars(cls)["__init__"].__annotations__.update(hints)
    for field in dataclasses.fields(cls):
        field.type = hints[field.name]
