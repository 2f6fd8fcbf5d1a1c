"""Pictures of runs: what is read, what is written, and that bins keep within the bounds."""

from __future__ import annotations

import json
import math
import random
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mwpb_fast.config import ConfigError, recipe, to_dict
from mwpb_fast.runs import plots

EPS = 32 / 255


def make_run(folder: Path, name: str = "digits.mwpb_at", epochs: int = 30, images: int = 300) -> Path:
    """A run's folder as training leaves it, with made-up numbers."""
    folder.mkdir(parents=True)
    config = recipe(name)
    alpha = getattr(config.budget, "alpha", 0.0)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    with (folder / "metrics.jsonl").open("w") as file:
        for epoch in range(1, epochs + 1):
            record: dict[str, Any] = {"epoch": epoch, "phase": "main", "loss": 2 / epoch, "learning_rate": 0.05}
            record |= {f"radius_{k}": EPS * math.exp(alpha * m) for k, m in (("min", -1), ("mean", 0), ("max", 1))}
            if epoch % 2 == 0:
                record |= {"natural": 90.0, "robust": 60.0}
            file.write(json.dumps(record) + "\n")
    margins = [-1.0, 1.0, *(random.uniform(-1, 1) for _ in range(images - 2))]
    radii = [struct.unpack("f", struct.pack("f", EPS * math.exp(alpha * m)))[0] for m in margins]
    content = {"epoch": epochs, "budget": to_dict(config)["budget"], "radii": radii}
    (folder / "radii.json").write_text(json.dumps(content))
    return folder


def size_of_png(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_one_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run")
    assert plots.write([run], run) == [run / "curves.png", run / "radii.png"]
    for path in (run / "curves.png", run / "radii.png"):
        width, height = size_of_png(path)
        assert 1000 <= width <= 2000
        assert 600 <= height <= 1400


def test_several_runs_share_the_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", "digits.trades", epochs=3),
        make_run(tmp_path / "c", "digits.control_mart", epochs=100),
    ]
    written = plots.write(runs, tmp_path / "new" / "folder")
    assert [path.name for path in written] == ["curves.png", "radii.png"]
    figure = plots.curves([plots.read_run(run) for run in runs])
    assert len(figure.axes) == 4
    loss = figure.axes[0]
    assert [len(line.get_xdata()) for line in loss.lines] == [30, 3, 100]
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert texts == ["digits.mwpb_at", "digits.trades", "digits.control_mart"]


def test_runs_of_one_recipe_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    labels = [run.label for run in plots._labelled([plots.read_run(f) for f in folders], folders)]
    assert labels == [f"digits.mwpb_at ({folder})" for folder in folders]


@pytest.mark.parametrize("name", ["digits.mwpb_at", "digits.at", "digits.control_at"])
def test_histogram_shows_every_image_once_and_within_the_bounds(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    run = plots.read_run(make_run(tmp_path / "run", name))
    axis = plots.histogram([run]).axes[0]
    assert sum(bar.get_height() for bar in axis.patches) == pytest.approx(100)
    low, high = (255 * bound for bound in run.bounds)
    filled = [bar for bar in axis.patches if bar.get_height() > 0]
    if run.alpha:
        assert min(bar.get_x() for bar in filled) == pytest.approx(low, rel=1e-3)
        assert max(bar.get_x() + bar.get_width() for bar in filled) == pytest.approx(high, rel=1e-3)
        marks = sorted(line.get_xdata()[0] for line in axis.lines)
        assert marks == pytest.approx([low, 32, high])
    else:
        assert len(filled) == 1
        assert filled[0].get_x() < 32 < filled[0].get_x() + filled[0].get_width()


def test_radii_beyond_the_bounds_are_shown_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = make_run(tmp_path / "run")
    content = json.loads((folder / "radii.json").read_text())
    content["radii"] += [EPS * 2.5, EPS / 3]
    (folder / "radii.json").write_text(json.dumps(content))
    axis = plots.histogram([plots.read_run(folder)]).axes[0]
    assert sum(bar.get_height() for bar in axis.patches) == pytest.approx(100)
    assert axis.get_xlim()[0] < 32 / 3 < 80 < axis.get_xlim()[1]


def test_radii_line(tmp_path: Path) -> None:
    run = plots.read_run(make_run(tmp_path / "a"))
    line = run.radii_line()
    assert "300 training images" in line
    assert f"min {32 * math.exp(-0.58):.2f}, mean " in line
    assert f"max {32 * math.exp(0.58):.2f} (exp(-alpha) eps = 17.92, exp(alpha) eps = 57.15)" in line
    fixed = plots.read_run(make_run(tmp_path / "b", "digits.at")).radii_line()
    assert fixed.endswith("min 32.00, mean 32.00, max 32.00")


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run", epochs=1)
    (run / "radii.json").unlink()
    assert plots.read_run(run).radii_line() == ""
    assert plots.write([run], run) == [run / "curves.png"]
    (run / "metrics.jsonl").unlink()
    assert plots.write([run], run) == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", "epochs: 3\n"),
        ("config.yaml", "a: [\n"),
        ("config.yaml", ""),
        ("metrics.jsonl", "3\n"),
        ("radii.json", "{"),
        ("radii.json", "[]"),
        ("radii.json", '{"radii": ["x"], "budget": {}}'),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, file: str, content: str) -> None:
    run = make_run(tmp_path / "run")
    (run / file).write_text(content)
    with pytest.raises(ConfigError) as caught:
        plots.read_run(run)
    assert str(run / file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the folder of a run"):
        plots.write([tmp_path], tmp_path)


def test_matplotlib_missing_is_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"which is not installed: pip install 'mwpb-fast\[plots\]'"):
        plots.write([run], run)
