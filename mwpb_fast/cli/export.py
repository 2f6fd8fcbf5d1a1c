"""The command that writes a run's model for other programs: takes its words and returns the exit status."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mwpb_fast.cli.parser import Parser
from mwpb_fast.config import ConfigError
from mwpb_fast.config.option_values import path
from mwpb_fast.export import CARD, FORMATS, MARK


def export(arguments: Sequence[str]) -> int:
    """write a run's model in a form that others read"""
    parser = Parser(
        "export",
        "Write the model of a run, or of one checkpoint of it, in a form that other programs read, with a card\n"
        f"({CARD}) beside it: recipe, radius, accuracies, trust verdicts, and how it is loaded. What was written\n"
        "is read back and held to the model on random images before it is said to be there.",
        "safetensors    the weights alone\n"
        "robustbench    a state dict that RobustBench's own classes load strictly\n"
        "torch-export   a program of torch.export, for any batch size\n"
        "onnx           the same for ONNX runtimes; needs the extra `export`",
    )
    add = parser.add_argument
    add("target", type=path, metavar="RUN|CHECKPOINT", help="a run's folder, or a checkpoint of one")
    add("--format", choices=list(FORMATS), required=True, help="see below")
    add("--out", type=path, metavar="FILE", help="(default: export-FORMAT/model.* in the run's folder)")
    add("--which", choices=["best", "last"], help="of a run's checkpoints (default: best)")
    given = parser.parse_intermixed_args(arguments)
    target: Path = given.target
    if not target.exists():
        raise ConfigError(f"{target}: does not exist")
    if given.which and target.is_file():
        raise ConfigError(f"--which says which checkpoint of a run's folder; {target} is a file")
    folder = target if target.is_dir() else target.parent
    out: Path = given.out or folder / f"export-{given.format}" / f"model{FORMATS[given.format]}"
    if out.suffix != FORMATS[given.format]:
        raise ConfigError(f"--out: a file of {given.format} ends in {FORMATS[given.format]}, {out} does not")
    about = out.with_name(CARD)
    if about.exists() and MARK not in about.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"{about}: is not of this command, and would be replaced; take --out in another folder")

    from mwpb_fast.export.card import card
    from mwpb_fast.export.formats import export
    from mwpb_fast.export.source import read_source
    from mwpb_fast.system.files import write_atomically

    source = read_source(target, given.which or "best")
    form = export(source, given.format, out)
    write_atomically(about, card(source, out.name, form.loading(source)).encode("utf-8", "backslashreplace"))
    for file in (out, about):
        print(f"written: {file}".encode(errors="backslashreplace").decode())
    return 0
