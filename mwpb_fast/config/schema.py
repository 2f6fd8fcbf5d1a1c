"""One run's whole configuration: frozen classes of plain values, each of which checks itself.

A method is a point in budget x attack x objective x weight perturbation; each of those is the `Config` of one
module, found by the module's name. Nothing heavy is imported here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from mwpb_fast.config.radius import check_linf
from mwpb_fast.method import AttackConfig, BudgetConfig, ObjectiveConfig, PerturbationConfig

AXES = {
    "warmup": "budgets",
    "budget": "budgets",
    "attack": "attacks",
    "objective": "objectives",
    "perturbation": "perturbations",
}  # option of a run: folder of the modules that it names
# options that saved configurations of earlier versions do not have
ADDED = frozenset({"natural_pass", "distributed", "keep", "guard"})


class ConfigError(ValueError):
    """What is wrong with a configuration, in one line."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """name: model file and its numbers, such as resnet-18, preactresnet-18, wrn-34-10, wrnsilu-28-10,
    smallresnet-16.
    normalize: put the data set's mean and standard deviation into the model as its first layer."""

    name: str = "resnet-18"
    normalize: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD with the learning rate divided by 10 at the start of each epoch in `drops` (counted from 1).

    ema: decay of an averaged copy of the weights, which is then validated and kept; 0 for none.
    clip_norm: the whole gradient is shortened to this norm where it is longer, before each step; 0 for never.
    fused: "torch" is PyTorch's own fused SGD, "apex" NVIDIA apex's FusedSGD: on CUDA alone, never captured, and
    each of its steps waits for the device.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    drops: tuple[int, ...] = (80, 90)
    drop_factor: float = 0.1
    ema: float = 0.0
    clip_norm: float = 0.0
    fused: str = "torch"

    def __post_init__(self) -> None:
        if not (0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf):
            raise ValueError("lr must be positive and finite, weight_decay must be finite and not negative")
        if not (0 <= self.momentum < 1 and 0 <= self.ema < 1 and 0 < self.drop_factor <= 1):
            raise ValueError("momentum and ema must be in [0, 1), drop_factor in (0, 1]")
        if not 0 <= self.clip_norm < math.inf:
            raise ValueError(f"clip_norm must be finite and not negative, not {self.clip_norm}")
        if self.fused not in ("torch", "apex"):
            raise ValueError(f"fused must be torch or apex, not {self.fused}")
        if list(self.drops) != sorted(self.drops) or any(epoch < 1 for epoch in self.drops):
            raise ValueError(f"drops must be rising epochs counted from 1, not {self.drops}")


ENGINES = ("auto", "eager", "twin", "by_hand", "halves", "one_kernel", "by_hand_stem", "one_kernel_stem")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """device: auto, cpu, cuda or cuda:N. dtype: auto (bf16 on CUDA, fp32 on the CPU), fp32 (not TF32), bf16, fp16.
    attack_dtype: of the attack alone: auto (as dtype), fp32 or bf16.
    engine: what the attack runs on: eager is the model itself, twin a copy with its batch norms folded in, by_hand
    and, on CUDA, one_kernel, by_hand_stem and one_kernel_stem that copy with fewer and larger operations, halves
    (CUDA) by_hand on both halves of the batch at the same time, auto the fastest that is right: a run that is long
    enough tries what may pay on its device on its first batch, another takes the twin on the CPU in float32, the
    model itself elsewhere.
    tune: for each convolution of the twin, time the plain call and those that fuse what follows it, and take the
    fastest; on CUDA cuDNN measures its algorithms, too.
    training: the training pass: plain is the model itself, fused has each batch norm, the addition and the ReLU
    behind it in one op, compiled is torch.compile's; auto is plain, or what a trial on CUDA shows to be right and
    faster.
    compile: the same as training=compiled.
    capture: record the whole step as one CUDA graph for each phase and replay it: true, false, or auto, where a
    trial shows that it is right and faster.
    pin: an engine.json of another run, whose choice is taken without a trial; or none.
    oracle: fp32, eager, contiguous, reference ops and deterministic algorithms: the truth to compare with."""

    device: str = "auto"
    engine: str = "auto"
    dtype: str = "auto"
    attack_dtype: str = "auto"
    tune: bool = False
    compile: bool = False
    training: str = "auto"
    capture: bool | Literal["auto"] = "auto"
    pin: str = "none"
    channels_last: bool = True
    oracle: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "fp32", "bf16", "fp16"):
            raise ValueError(f"dtype must be auto, fp32, bf16 or fp16, not {self.dtype}")
        if self.attack_dtype not in ("auto", "fp32", "bf16"):
            raise ValueError(f"attack_dtype must be auto, fp32 or bf16, not {self.attack_dtype}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be {', '.join(ENGINES[:-1])} or {ENGINES[-1]}, not {self.engine}")
        for dtype in (self.dtype, self.attack_dtype):
            if self.oracle and dtype not in ("auto", "fp32"):
                raise ValueError(f"the oracle computes in fp32, not {dtype}")
        if self.tune and self.engine not in ("auto", "twin"):
            raise ValueError("tune chooses among the twin's convolutions: it needs engine=twin or auto")
        if self.capture not in (True, False, "auto"):
            raise ValueError(f"capture must be auto, true or false, not {self.capture}")
        if self.training not in ("auto", "plain", "fused", "compiled"):
            raise ValueError(f"training must be auto, plain, fused or compiled, not {self.training}")
        if self.compile and self.training not in ("auto", "compiled"):
            raise ValueError(f"compile is training=compiled, not {self.training}")
        if self.oracle and (self.capture is True or self.compile or self.training not in ("auto", "plain")):
            raise ValueError("the oracle runs eagerly, without capture, compile or another training")
        if self.pin != "none" and (self.oracle or self.engine != "auto" or self.capture != "auto"):
            raise ValueError("pin says which engine is taken: leave engine and capture at auto, and oracle off")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """attacks: such as natural, pgd20, pgd20x5 (5 starts), cw20, aa; `mwpb-fast evaluate --help` lists them;
    pgd20@6/255 has a radius of its own, aa-l2 has 128/255 by itself, pgd20-eot10 takes the mean of 10 gradients.
    eps, step_size: of the others, the latter of pgd and cw, in the units of images in [0, 1]; since these attacks
    are linf, at most 1. subset: attack only so many test images, stratified by class (results are then labelled a
    preview); 0 for all. costly_subset: the same for spsa and the planted examples of trust. validate_every: epochs
    between validations by PGD-10. engine: what AutoAttack
    searches on: auto, the model's folded twin in float32 where it is held to the model, which judges every image;
    or eager, the model itself. tf32: on CUDA the twin's convolutions in TF32, not full float32."""

    attacks: tuple[str, ...] = ("natural", "pgd20", "cw20")
    eps: Fraction = Fraction(8, 255)
    step_size: Fraction = Fraction(1, 255)
    batch_size: int = 250
    subset: int = 0
    costly_subset: int = 1000
    validate_every: int = 1
    engine: str = "auto"
    tf32: bool = False

    def __post_init__(self) -> None:
        if self.engine not in ("auto", "eager"):
            raise ValueError(f"engine must be auto or eager, not {self.engine}")
        if self.tf32 and self.engine == "eager":
            raise ValueError("tf32 is of the twin: it needs engine=auto")
        if self.batch_size < 1 or self.subset < 0 or self.costly_subset < 0 or self.validate_every < 1:
            raise ValueError("batch_size and validate_every must be at least 1, subset not negative")
        check_linf("eps", self.eps)
        check_linf("step_size", self.step_size)


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Of a run in several processes, as torchrun starts them; each takes an equal part of every batch.

    sync_bn: batch norms in train mode take the statistics of the whole batch, as one process does; else each
    process those of its part, and the running ones are averaged: less to send, but what is computed then depends
    on the number of processes.
    per_rank: none, data.batch_size is the whole batch; else it is each process's part, and optim.lr is kept
    (constant), multiplied by the number of processes (linear) or by its root (sqrt)."""

    sync_bn: bool = True
    per_rank: Literal["none", "constant", "linear", "sqrt"] = "none"

    def __post_init__(self) -> None:
        if self.per_rank not in ("none", "constant", "linear", "sqrt"):
            raise ValueError(f"per_rank must be none, constant, linear or sqrt, not {self.per_rank}")


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """Which checkpoints a run keeps. last, best: so many of the newest states and of the best epochs. minutes: a
    state is also written within an epoch, this long after the one before; 0 for never. safetensors: the weights of
    the best epochs stand beside their checkpoints in a file of that format, too."""

    last: int = 2
    best: int = 1
    minutes: float = 0.0
    safetensors: bool = True

    def __post_init__(self) -> None:
        if self.last < 1 or self.best < 1 or not 0 <= self.minutes < math.inf:
            raise ValueError("last and best must be at least 1, minutes finite and not negative")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a run is watched for. loss, loss_steps: it has diverged where its loss lay above so much for so many
    steps on end; 0 for no bound. collapse: it overfits catastrophically where PGD-10 accuracy on the validation
    images lies so many points below its best while FGSM accuracy has risen; 0 for not looking. action: then tell
    says so on stderr and in the epoch's record, stop ends the run as well, roll_back goes back to a state before
    it, with the learning rate times `rate` from there on, at most `rollbacks` times, and then stops. hang: seconds
    without a step or a batch of validation after which the run is ended, with the stack; 0 for never."""

    loss: float = 100.0
    loss_steps: int = 100
    collapse: float = 15.0
    action: Literal["tell", "stop", "roll_back"] = "tell"
    rate: float = 0.5
    rollbacks: int = 3
    hang: float = 3600.0

    def __post_init__(self) -> None:
        if not (0 <= self.loss < math.inf and 0 <= self.hang < math.inf and 0 <= self.collapse <= 100):
            raise ValueError("loss and hang must be finite and not negative, collapse in [0, 100]")
        if self.loss_steps < 1 or self.rollbacks < 0 or not 0 < self.rate <= 1:
            raise ValueError("loss_steps must be at least 1, rollbacks not negative, rate in (0, 1]")
        if self.action not in ("tell", "stop", "roll_back"):
            raise ValueError(f"action must be tell, stop or roll_back, not {self.action}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run. epochs: in all; the first `warmup_epochs` use the `warmup` budget, the others `budget`.

    attack_mode: how batch normalisation runs while margins and attacks are computed: eval; train; or batch, as
    train but leaving the running statistics alone.
    natural_pass: before the training pass on the adversarial images send the natural ones through the model in
    train mode, which moves the running statistics and nothing else; for objectives that do not do so themselves.
    The axes hold the `Config` of the modules that they name; data is `mwpb_fast.data.dataset.Config`.
    """

    recipe: str
    data: Any
    budget: BudgetConfig
    attack: AttackConfig
    objective: ObjectiveConfig
    warmup: BudgetConfig
    perturbation: PerturbationConfig
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    precision: PrecisionConfig = PrecisionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    distributed: DistributedConfig = DistributedConfig()
    keep: KeepConfig = KeepConfig()
    guard: GuardConfig = GuardConfig()
    seed: int = 0
    epochs: int = 110
    warmup_epochs: int = 0
    attack_mode: str = "eval"
    natural_pass: bool = False
    max_bad_steps: int = 20

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.warmup_epochs < 0 or self.max_bad_steps < 0:
            raise ValueError("epochs, warmup_epochs and max_bad_steps must not be negative")
        if self.attack_mode not in ("eval", "train", "batch"):
            raise ValueError(f"attack_mode must be eval, train or batch, not {self.attack_mode}")
