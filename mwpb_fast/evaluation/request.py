"""What is asked of an evaluation of a file, as plain data: nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from mwpb_fast.config import Config, EvaluationConfig


@dataclass(frozen=True)
class Request:
    """One checkpoint to attack on its test split; `evaluate_run`, its helper processes and `trust_run` take it.

    target: a run's folder, one checkpoint, a file of weights, or a name of a model in code, see `named`.
    images: for such a model, `module:name` of its images, see `evaluate`; those of config without it. evaluation,
    data_dir, device: instead of the run's own. which: of a run's checkpoints, best or last. config: says the model
    and data set of a bare file of weights; weights: which of several sets in it, by the beginning of its place,
    or for a model in code FILE or FILE:PLACE. seed: of what is random in the attacks. processes: how many share
    the long attacks on the CPU; as many as there are threads if None. show: a bar of progress for each attack.
    save_images: keep the adversarial images.
    """

    target: Path
    evaluation: EvaluationConfig | None = None
    _: KW_ONLY
    which: str = "best"
    config: Config | None = None
    weights: str = ""
    images: str = ""
    data_dir: Path | str | None = None
    device: str | None = None
    seed: int = 0
    processes: int | None = None
    show: bool = True
    save_images: bool = False
