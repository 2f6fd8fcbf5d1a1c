"""Whether the installed trainer works in an empty folder: help, training, evaluation, report, export."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import mwpb_fast

TINY = (
    "--epochs 1 --warmup_epochs 0 --optim.drops 1 --model.name smallresnet-16 --data.subset 64 --data.validation 0"
)


def command(line: str) -> str:
    done = subprocess.run(
        [Path(sys.prefix) / "bin" / "mwpb-fast", *line.split()], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, f"mwpb-fast {line}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


assert Path(str(mwpb_fast.__file__)).is_relative_to(sys.prefix), mwpb_fast.__file__
assert version("mwpb-fast") == version("mwpb-kernels")
assert "train RECIPE" in command("--help")
assert command("--version").split() == ["mwpb-fast", version("mwpb-fast")]
command(f"train digits.mwpb_at {TINY} --out run --evaluation.attacks natural,pgd20")
run = Path("run")
assert '"pgd20"' in (run / "evaluation-best.json").read_text(encoding="utf-8")
command("report run")
assert "</html>" in (run / "report.html").read_text(encoding="utf-8")
command("export run --format safetensors")
assert (run / "export-safetensors" / "model.safetensors").stat().st_size > 1000
print(f"mwpb-fast {version('mwpb-fast')}, torch {version('torch')}: help, training, evaluation, report, export")
