"""The layout of an evaluation on CUDA: which is taken, and where it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_cases import config, untrained_state
from torch import nn

from mwpb_fast import data
from mwpb_fast.config import PrecisionConfig, recipe, to_dict
from mwpb_fast.engine.precision import Precision, make_precision
from mwpb_fast.evaluation import checkpoint as subjects
from mwpb_fast.evaluation.layout import faster_layout
from mwpb_fast.evaluation.request import Request
from mwpb_fast.runs import checkpoint


class Seen(nn.Module):
    """Notes the layouts of images and weights, and the inner precision of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.calls = nn.Conv2d(3, 4, 3), list[tuple[bool, bool, str]]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layouts = [t.is_contiguous(memory_format=torch.channels_last) for t in (x, self.inside.weight)]
        conv: Any = torch.backends.cudnn.conv
        self.calls.append((layouts[0], layouts[1], conv.fp32_precision))
        return self.inside(x).mean((2, 3))


@pytest.mark.parametrize(
    ("contiguous", "expected"),
    [(0.5, torch.contiguous_format), (0.98, torch.channels_last), (2.0, torch.channels_last)],
)
def test_the_faster_layout_is_taken_and_near_one_another_channels_last(
    contiguous: float, expected: torch.memory_format
) -> None:
    model = Seen().eval()

    def clock(work: Callable[[], object]) -> float:
        work()
        return 1.0 if model.calls[-1][0] else contiguous

    assert faster_layout(model, torch.rand(2, 3, 8, 8), clock) == expected
    assert set(model.calls) == {(False, False, "ieee"), (True, True, "ieee")}
    assert model.inside.weight.is_contiguous(memory_format=expected)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_it_is_measured_on_cuda_alone_and_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = untrained_state()
    tuned = PrecisionConfig(device="cpu", engine="twin", tune=True)
    state["config"] = to_dict(replace(recipe("digits.mwpb_at"), precision=tuned))
    checkpoint.save(tmp_path / "checkpoints", "best", 3, 0, state)
    asked: list[int] = []
    wanted: list[PrecisionConfig] = []

    def noted(precision: PrecisionConfig) -> Precision:
        wanted.append(precision)
        return make_precision(precision)

    def measured(model: nn.Module, x: torch.Tensor) -> torch.memory_format:
        asked.append(len(x))
        return torch.contiguous_format

    monkeypatch.setattr(subjects, "faster_layout", measured)
    monkeypatch.setattr(subjects, "make_precision", noted)
    settings = config("natural", subset=8, batch_size=16)
    subject = subjects.Subject(Request(tmp_path, settings, processes=1, show=False))
    assert not asked
    assert not wanted[0].tune  # cuDNN would measure for each number of images that an attack goes on with
    assert subject.attack()["layout"] == "channels_last"
    real, cpu = data.eval_batches, torch.device("cpu")
    monkeypatch.setattr(data, "eval_batches", lambda images, device, *rest: real(images, cpu, *rest))
    subject.precision = replace(subject.precision, device=torch.device("cuda"))
    made: Any = (subject.model, subject.images)
    assert subject._layout(*made) == torch.contiguous_format
    subject.precision = replace(subject.precision, memory_format=torch.contiguous_format)
    assert subject._layout(*made) == torch.contiguous_format
    assert asked == [16]
