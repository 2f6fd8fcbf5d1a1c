"""Reports of runs that differ in their seed: put together, and seed by seed against another method."""

from __future__ import annotations

from pathlib import Path

import yaml
from report_cases import attack, result, whole_run, write
from test_plots import make_run
from test_report import report


def seeded(folder: Path, name: str, seed: int, right: int) -> Path:
    """A run with a seed of its own, of whose 100 images so many withstand AutoAttack."""
    run = whole_run(folder / f"{name}-{seed}", name)
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) | {"seed": seed}
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (run / "trust-best.json").unlink()
    flags = attack("1" * right + "0" * (100 - right), norm="linf", eps="8/255")
    found = result(worst=flags | {"of": ["natural", "pgd20", "aa"]})
    write(run / "evaluation-best.json", found | {"attacks": found["attacks"] | {"aa": flags}})
    return run


def test_seeds_stand_together(tmp_path: Path) -> None:
    """Mean and deviation of each method, and the difference seed by seed with Student's interval, by hand."""
    of = {"digits.at": (40, 44, 42), "digits.mwpb_at": (45, 47, 49)}
    runs = [seeded(tmp_path, name, seed, n) for name, ns in of.items() for seed, n in enumerate(ns)]
    page = report(*runs)
    assert "digits.at 0, 1, 2 42.00 \u00b1 2.00" in page.text
    assert "digits.mwpb_at 0, 1, 2 47.00 \u00b1 2.00" in page.text
    # 5, 3 and 7: 2 / sqrt(3) times Student's 4.3027 about 5
    assert "digits.mwpb_at robust +5.00 +0.03 to +9.97 higher 3" in page.text
    assert "digits.mwpb_at natural +0.00 +0.00 to +0.00 no clear difference 3" in page.text
    # image by image against the run of the same seed: 47 and 44 of 100
    assert "digits.mwpb_at, seed 1 aa +3.00" in page.text
    assert "digits.mwpb_at, seed 1 natural" in page.text.partition("Against digits.at, image by image")[2]
    assert page.text.index("Over the seeds") < page.text.index("can it be believed?")
    assert "but for the seed" in report(*runs[:3]).text
    assert "Over the seeds" not in report(runs[0], runs[3]).text


def test_seeds_with_another_evaluation_are_left_out(tmp_path: Path) -> None:
    runs = [seeded(tmp_path, "digits.at", seed, n) for seed, n in enumerate((40, 44, 42))]
    write(runs[2] / "evaluation-best.json", result(n=50))
    page = report(*runs, make_run(tmp_path / "begun", "digits.mwpb_at", epochs=0))
    assert "digits.at 0, 1, 2 42.00 \u00b1 2.83" in page.text  # of the first two
    again = seeded(tmp_path / "other", "digits.at", 0, 10)
    assert f"digits.at ({again})" in report(*runs, again).text
