"""A model with a folded twin, and the twin as AutoAttack searches on it."""

from __future__ import annotations

from typing import Any

import torch
from evaluate_cases import PRECISION
from torch import Tensor, nn

from mwpb_fast.evaluation.search import Search, make_search
from mwpb_fast.evaluation.watched import Watched
from mwpb_fast.models import build_model


def normed() -> nn.Module:
    """Norms with statistics of their own, and logits far enough apart that rounding decides nothing."""
    torch.manual_seed(0)
    made = build_model("smallresnet-4", num_classes=10, channels=1).train()
    made(torch.rand(64, 1, 10, 10))
    made.requires_grad_(False)
    made.get_submodule("linear").weight.mul_(20)  # type: ignore[operator, union-attr]
    return made.eval()


def watched(model: nn.Module) -> Watched:
    return Watched(model, torch.channels_last, torch.device("cpu"))


def search_of(model: Watched, x: Tensor, **options: Any) -> Search:
    found, why = make_search(model, x, PRECISION, len(x), False, **options)
    assert found is not None, why
    return found
