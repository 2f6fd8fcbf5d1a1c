"""The command that writes a run's model for other programs: takes its words and returns the exit status."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mwpb_fast.cli.parser import Parser
from mwpb_fast.config import ConfigError
from mwpb_fast.config.option_values import path
from mwpb_fast.export import CARD, FORMATS, MARK

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def export(arguments: Sequence[str]) -> int:
    """write a run's model in a form that others read"""
    parser = Parser(
        "export",
        "Write the model of a run, or of one checkpoint of it, in a form that other programs read, with a card\n"
        f"({CARD}) beside it: recipe, radius, accuracies, trust verdicts, and how it is loaded. What was written\n"
        "is read back and held to the model on random images before it is said to be there.",
        "safetensors    the weights alone\n"
        "robustbench    a state dict that RobustBench's own classes load strictly; of the models that it has:\n"
        "               resnet, preactresnet, wrn and wrnsilu, not smallresnet\n"
        "torch-export   a program of torch.export, for any batch size\n"
        "onnx           the same for ONNX runtimes; needs the extra `export`\n\n"
        "--push-to-hub (the extra `hub`) sends file and card to the Hugging Face hub as well. The token is that\n"
        "of HF_TOKEN or of `hf auth login`. A new repository is private, unless --public says otherwise.",
    )
    add = parser.add_argument
    add("target", type=path, metavar="RUN|CHECKPOINT", help="a run's folder, or a checkpoint of one")
    add("--format", choices=list(FORMATS), default="safetensors", help="see below (default: safetensors)")
    add("--out", type=path, metavar="FILE", help="(default: export-FORMAT/model.* in the run's folder)")
    add("--which", choices=["best", "last"], help="of a run's checkpoints (default: best)")
    add("--push-to-hub", metavar="ORG/NAME", help="send it to this model repository, which is made if need be")
    seen = parser.add_mutually_exclusive_group()
    for word, private in (("--private", True), ("--public", False)):
        what = "what the repository must be, and a new one is made"
        seen.add_argument(word, dest="private", action="store_const", const=private, help=what)
    given = parser.parse_intermixed_args(arguments)
    target: Path = given.target
    if not target.exists():
        raise ConfigError(f"{target}: does not exist")
    if given.which and target.is_file():
        raise ConfigError(f"--which says which checkpoint of a run's folder; {target} is a file")
    repository: str = given.push_to_hub or ""
    if given.push_to_hub is not None and not REPOSITORY.fullmatch(repository):
        raise ConfigError(f"--push-to-hub takes ORG/NAME, such as me/mwpb-digits, not {repository!r}")
    if given.private is not None and not repository:
        raise ConfigError("--private and --public go with --push-to-hub")
    folder = target if target.is_dir() else target.parent
    out: Path = given.out or folder / f"export-{given.format}" / f"model{FORMATS[given.format]}"
    if out.suffix != FORMATS[given.format]:
        raise ConfigError(f"--out: a file of {given.format} ends in {FORMATS[given.format]}, {out} does not")
    about = out.with_name(CARD)
    if about.exists() and MARK not in about.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"{about}: is not of this command, and would be replaced; take --out in another folder")

    from mwpb_fast.export.card import card
    from mwpb_fast.export.formats import export
    from mwpb_fast.export.hub import push, require
    from mwpb_fast.export.source import read_source
    from mwpb_fast.system.files import write_atomically

    if repository:
        require()
    source = read_source(target, given.which or "best")
    form = export(source, given.format, out)
    text = card(source, out.name, form.loading(source), repository)
    write_atomically(about, text.encode("utf-8", "backslashreplace"))
    for file in (out, about):
        print(f"written: {file}".encode(errors="backslashreplace").decode())
    if repository:
        print(f"pushed: {push([out, about], repository, given.private)}")
    return 0
