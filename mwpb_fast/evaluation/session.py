"""One evaluation's model, images and setting, checked before anything long is begun."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import mwpb_kernels as ops
import torch

from mwpb_fast import data
from mwpb_fast.config import EvaluationConfig
from mwpb_fast.engine.precision import Precision, full_float32
from mwpb_fast.evaluation.catalog import find_attack, shard_name
from mwpb_fast.evaluation.code import hash_code
from mwpb_fast.evaluation.contract import AttackSetting, EvaluationAttack, check_images, check_labels, gathered
from mwpb_fast.evaluation.function import PROBES, examine, probes
from mwpb_fast.evaluation.model_checks import (
    EvaluationError,
    Model,
    check_model,
    hash_attributes,
    hash_model,
    weights_frozen,
)
from mwpb_fast.evaluation.search import PLAIN, make_search
from mwpb_fast.evaluation.sharded import ShardedAttack
from mwpb_fast.evaluation.watched import Called, Watched
from mwpb_fast.runs.log import environment, own_version

NORM = "linf"
Pair = tuple[torch.Tensor, torch.Tensor]
TestSet = data.Images | Pair | Iterable[Pair]


class Session:
    """A checked model and the images to attack.

    images: a data set's Images, x (N, C, H, W) float in [0, 1] and y (N,) integers, or batches of such pairs, read
    once; config.subset says how many of them to attack. folder: for shard files, or None. seed: of what is random
    in the attacks. extra: what is measured besides the attacks that the configuration names. Raises
    EvaluationError and ConfigError for what cannot be evaluated."""

    def __init__(
        self,
        model: Model,
        images: TestSet,
        config: EvaluationConfig,
        precision: Precision,
        folder: Path | None = None,
        seed: int = 0,
        extra: dict[str, EvaluationAttack] | None = None,
        save_images: bool = False,
    ) -> None:
        pair = (images.images, images.labels) if isinstance(images, data.Images) else images
        pixels, labels, note = gathered(pair)
        pixels = check_images(pixels)
        labels = check_labels(labels, len(pixels))
        self.named = config.attacks
        self.attacks = {name: find_attack(name) for name in self.named} | (extra or {})
        index, self.preview = choose(labels, config.subset)
        if not self.attacks or len(index) == 0:
            raise EvaluationError("nothing to evaluate: evaluation.attacks is empty, or there are no images")
        model = model if isinstance(model, torch.nn.Module) else Called(model)
        check_model(model, precision)
        self.pixels, self.labels, self.index = pixels, labels, index
        if save_images and folder is None:
            raise EvaluationError("save_images needs a folder to save them in")
        self.precision, self.folder, self.save_images = precision, folder, save_images
        self.costly = choose(labels, min(config.costly_subset or len(labels), len(index)))[0]
        self.model = Watched(model, precision.memory_format, precision.device)
        spread = torch.linspace(0, len(pixels) - 1, min(PROBES, len(pixels))).long()
        with self.ready(lambda: None):
            self.function = self.model.with_room(lambda: examine(self.model, probes(self.load(spread)[0])))
        classes = self.model.classes
        if classes < 2:
            raise EvaluationError("the model cannot be evaluated: it gives one logit an image, for one class")
        if int(labels.max()) >= classes:
            raise EvaluationError(f"labels reach {int(labels.max())}, the model has {classes} classes")
        blind = [name for name, attack in self.attacks.items() if attack.gradients]
        if blind and self.function.no_gradient:
            raise EvaluationError(
                f"{blind[0]} follows the model's gradient, and there is none: {self.function.no_gradient}; "
                "natural, square and spsa need none"
            )
        self.packages = {name: attack.needs(classes) for name, attack in self.attacks.items()}
        self.setting = AttackSetting(
            eps=config.eps,
            step_size=config.step_size,
            precision=precision,
            norm=NORM,
            seed=seed,
            batch_size=config.batch_size,
        )
        self.notes = [note] if note else []
        if pixels.shape[1] > 4 and pixels.shape[3] in (1, 3):
            self.notes.append(f"images are {tuple(pixels.shape[1:])}, read as (C, H, W): are their channels last?")
        if self.model.layout != precision.memory_format:
            self.notes.append("contiguous images: the model cannot take channels-last ones, or not rightly")
        if "randomized" in self.function.doubts:
            self.notes.append("the model's logits are random: a flag is one draw of the prediction")
        self.notes += short_of_crossing(self.attacks, self.setting)
        self.engine = self._choose_engine(config, self.load(spread)[0])
        names = images.classes if isinstance(images, data.Images) else ()
        self.classes = [*names, *map(str, range(len(names), classes))]
        self.model_hash, self.data_hash = hash_model(model), self._hash_data(index)
        self.attributes, self.code = hash_attributes(model), hash_code(model)

    @contextlib.contextmanager
    def ready(self, tick: Callable[[], None]) -> Iterator[None]:
        """The state in which attacks run: weights frozen, full float32, the precision's own mode, whatever mode
        of autograd the caller is in; tick is called before every forward pass and may raise."""
        self.model.tick = tick
        with (
            torch.inference_mode(False),
            weights_frozen(self.model),
            self.precision.mode(),
            full_float32(),
            torch.enable_grad(),
        ):
            yield

    def _choose_engine(self, config: EvaluationConfig, images: torch.Tensor) -> str:
        """What AutoAttack searches on; a note where that is not what was asked for."""
        if config.tf32 and self.precision.device.type != "cuda":
            raise EvaluationError("evaluation.tf32: TF32 is of CUDA devices; leave it off")
        searching = any(attack.searches for attack in self.attacks.values())
        if config.engine == "eager" or not searching or self.precision.oracle:
            return PLAIN
        why = "its logits are random"
        if "randomized" not in self.function.doubts:
            with self.ready(lambda: None):
                batch = min(config.batch_size, len(self.index))
                self.model.search, why = make_search(self.model, images, self.precision, batch, config.tf32)
        if self.model.search is not None:
            return str(self.model.search.name)
        self.notes.append(f"AutoAttack searches on the model itself, which has no folded twin: {why}")
        return PLAIN

    @property
    def doubts(self) -> dict[str, str]:
        """What makes its numbers doubtful, by kind. That a model is random does not where all attacks average, nor
        that it has no slope where none follows it."""
        moving = [attack for attack in self.attacks.values() if attack.ball]
        idle = {"randomized"} if moving and all(attack.passes > 1 for attack in moving) else set()
        idle |= set() if any(attack.gradients for attack in moving) else {"zero_gradients"}
        return {kind: text for kind, text in self.function.doubts.items() if kind not in idle}

    def load(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (n, C, H, W) float32 and labels (n,) on the device."""
        device = self.precision.device
        x, y = self.pixels[index.to(self.pixels.device)].to(device), self.labels[index].to(device)
        if x.dtype == torch.uint8:
            rows, key = torch.arange(len(x), device=device), torch.zeros(1, dtype=torch.int64, device=device)
            x = ops.crop_flip(x.contiguous(memory_format=torch.channels_last), rows, key, pad=0, flip=False)
        return x, y

    def attack(self, name: str) -> ShardedAttack:
        """The attack of that name on the chosen images; on fewer where it is costly."""
        attack = self.attacks[name]
        index = self.costly if attack.costly else self.index
        key = {
            "model": self.model_hash,
            "attributes": self.attributes,
            "layout": str(self.model.layout),
            "mwpb-fast": own_version(),
            "data": self._hash_data(index) if attack.costly else self.data_hash,
            "device": self.precision.device.type,
            "torch": str(torch.__version__),
            "packages": self.packages[name],
        } | ({"code": self.code} if self.code else {})
        setting = attack.setting(self.setting)
        name, folder, fingerprint = shard_name(name), self.folder, self.function.fingerprint
        engine = self.engine if attack.searches else ""
        return ShardedAttack(
            name, attack, index, self.load, setting, folder, key, fingerprint, self.save_images, engine
        )

    def describe(self) -> dict[str, Any]:
        """What the numbers depend on."""
        setting = self.setting
        packages = {name: version for own in self.packages.values() for name, version in own.items()}
        return {
            "n": len(self.index),
            "eps": str(setting.eps),
            "eps_float": float(setting.eps),
            "step_size": str(setting.step_size),
            "step_size_float": float(setting.step_size),
            "norm": setting.norm,
            "classes": self.classes,
            "seed": setting.seed,
            "batch_size": setting.batch_size,
            "dtype": str(setting.precision.dtype).removeprefix("torch."),
            "layout": str(self.model.layout).removeprefix("torch."),
            "notes": self.notes + self._room(),
            "model_sha256": self.model_hash,
            "data_sha256": self.data_hash,
            "environment": environment(setting.precision.device) | packages,
        }

    def _room(self) -> list[str]:
        at_once = self.model.at_once
        return [f"at most {at_once} images at once went through the model: no memory for more"] if at_once else []

    def _hash_data(self, index: torch.Tensor) -> str:
        pixels = self.pixels
        digest = hashlib.sha256(str((tuple(pixels.shape), str(pixels.dtype))).encode())
        for part in index.split(1000):
            chosen = pixels[part.to(pixels.device)].cpu().contiguous()
            digest.update(chosen.numpy().tobytes() + self.labels[part].numpy().tobytes())
        return digest.hexdigest()


def short_of_crossing(attacks: dict[str, EvaluationAttack], common: AttackSetting) -> list[str]:
    """A note, or none, on the attacks whose steps together are shorter than the ball is wide: from a start at one
    side they cannot come to the other."""
    short = []
    for name, attack in attacks.items():
        own = attack.setting(common)
        if attack.stepped and attack.stepped * own.step_size < 2 * own.eps:
            short.append(f"{name} ({attack.stepped} steps of {own.step_size}, eps {own.eps})")
    return [f"steps too short, or too few, to cross the ball: {', '.join(short)}"] if short else []


def choose(labels: torch.Tensor, subset: int) -> tuple[torch.Tensor, bool]:
    """The numbers of the images to attack, (n,) int64, and whether they are only a part of them: `subset` of
    them, stratified by class, since many sets lie sorted by class; all for 0. A smaller subset is a part of a
    larger one."""
    if not 0 < subset < len(labels):
        return torch.arange(len(labels)), False
    return data.stratified_order(labels)[:subset].sort().values, True
