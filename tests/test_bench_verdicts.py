"""The scripts about AutoAttack's verdicts and speed: the models that they need, and the peers that they know."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mwpb_fast import data
from mwpb_fast.config import Config


def test_the_models_of_the_ledger_are_trained(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but those whose data is not there."""
    models, trained = bench("verdict_models"), {}

    def run(config: Config, folder: Path) -> None:
        data.load_split(config.data, "train")
        trained[folder.name] = config

    monkeypatch.setattr(models.train, "run", run)
    found = {name: models.configuration(name, "data") for name in models.MODELS}
    assert [config.data.name for config in found.values()] == ["cifar4", "digits", "cifar10", "cifar4"]
    assert [float(config.budget.eps) > 0 for config in found.values()] == [True, True, False, False]
    for name in models.MODELS:
        assert f"runs/{name}" in models.__doc__
    assert models.main(["--data-dir", str(tmp_path), "--epochs", "2"]) == 2
    out, err = capsys.readouterr()
    assert [*trained] == ["digits-at"]
    assert trained["digits-at"].epochs == 2
    assert "digits-at: runs/digits-at" in out
    missing = [line.split(" is not trained: ") for line in err.splitlines() if "not trained" in line]
    assert [name for name, _ in missing] == ["cifar4-at", "cifar10-natural", "cifar4-wrn"]
    assert all("mwpb-fast data prepare cifar" in why for _, why in missing)
    assert models.main(["--data-dir", str(tmp_path), "--only", "digits-at"]) == 0


@pytest.mark.parametrize("part", ["apgd-ce", "apgd-t"])
def test_adv_lib_is_a_peer_without_its_dependencies(bench: Any, part: str) -> None:
    pytest.importorskip("adv_lib")
    module = bench("autoattack")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    x = torch.rand(4, 3, 8, 8)
    y = model(x).argmax(1)
    for eps, found in ((1e-5, True), (0.9, False)):
        module.EPS = eps
        attack = module.of_adv_lib(model, part, Namespace(counts={part: 5}))
        assert attack(x, y).tolist() == [found] * 4
