"""The commands that attack a checkpoint: each takes its words and returns the exit status."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from mwpb_fast import options
from mwpb_fast.cli.parser import Parser
from mwpb_fast.config import ConfigError, EvaluationConfig
from mwpb_fast.config.option_values import path, whole
from mwpb_fast.config.radius import parse_radius
from mwpb_fast.evaluation.catalog import find_attack, there_are
from mwpb_fast.evaluation.named import is_name
from mwpb_fast.evaluation.request import Request
from mwpb_fast.system import ranks

# of a recipe's values, those that a model depends on; the data's that choose the images of statistics, too
USED = r"model\..*|precision\.(device|channels_last|oracle)|data\.(name|dir|validation|subset)"
OWN = ("subset", "costly_subset", "attacks", "eps", "step_size", "batch_size", "engine", "tf32")


def evaluate(arguments: Sequence[str]) -> int:
    """attack a run's checkpoint, a file of weights, or any model"""
    parser = Parser(
        "evaluate",
        "Attack a run's checkpoint, show the accuracies and save them as JSON beside it.",
        textwrap.fill(f"Attacks: {there_are()}.", 105, break_on_hyphens=False)
        + "\nThe number is that of the steps, or of spsa's pairs. aa is AutoAttack; apgd-ce, apgd-t, fab and\n"
        "square are its parts alone, aa-fast is a preview of it; aa-rand and pgd20-eot10 are for models that\n"
        "are randomised.\n\n"
        "A file of weights from elsewhere needs a recipe that says what model and data set it belongs to:\n"
        "  mwpb-fast evaluate weights.pt --recipe table1.at --model.name resnet-18 --attacks natural,pgd20\n\n"
        "A model in code is named as MODULE:NAME or FILE.py:NAME: a module, a function from images to logits, or\n"
        "what makes one when called without arguments. --weights fills it from a file, strictly. Its images are\n"
        "named likewise, as (x, y) or a loader, or by a recipe:\n"
        "  mwpb-fast evaluate theirs/model.py:Net --weights cnn.pth --recipe table1.at\n"
        "  mwpb-fast evaluate mine.nets:net --images mine.nets:test_set --attacks natural,pgd20,aa",
    )
    add = parser.add_argument
    own = _target(parser)
    own += [
        add("--attacks", metavar="A,B,...", help="such as natural,pgd20,cw20,aa (default: the run's)"),
        add("--costly-subset", type=whole, metavar="N", help="images for spsa, 0 for all (default: the run's)"),
        add("--images", type=named, metavar="MODULE:NAME", help="of a model in code"),
        add("--engine", choices=["auto", "eager"], help="of AutoAttack's search: the folded twin, or the model"),
        add("--tf32", action="store_const", const=True, help="the twin's convolutions in TF32, on CUDA"),
        add("--per-class", action="store_true", help="show each class's accuracies and confusions too"),
        add("--save-images", action="store_true", help="keep the adversarial images, for `mwpb-fast verify`"),
        add("--accept-warnings", action="store_true", help="exit with 0 although the result is doubtful"),
    ]
    given, request = _read(parser, own, arguments, rf"evaluation\.({'|'.join(OWN)})")
    options.check_attacks(request.evaluation)
    _refuse_idle_settings(given, request.evaluation or EvaluationConfig())

    from mwpb_fast.evaluation.checkpoint import evaluate_run
    from mwpb_fast.evaluation.per_class import format_classes
    from mwpb_fast.evaluation.score import format_table

    lines: list[str] = []
    result = evaluate_run(request, lines.append)
    print(format_table(result))
    if given.per_class:
        print(f"\n{format_classes(result)}")
    _close(result, lines)
    if result["warnings"] and not given.accept_warnings:
        print(
            "mwpb-fast: this result is doubtful, see the warnings; --accept-warnings to let it pass",
            file=sys.stderr,
        )
        return 1
    return 0


def trust(arguments: Sequence[str]) -> int:
    """say whether a checkpoint's robust accuracy can be believed"""
    parser = Parser(
        "trust",
        "Attack a run's checkpoint in many ways, and say in plain lines, `ok:` or `doubt:`, whether its robust\n"
        "accuracy can be believed: AutoAttack at one radius beside PGD at the run's own radii, radii up to where\n"
        "nothing is right, more steps and starts, one step, a black box, adversarial examples planted to be\n"
        "found, and the known ways in which attacks fail. The report is printed as Markdown and saved as\n"
        "trust-<which>.json and .md beside the checkpoint.",
        "The exit status is 0 whatever the verdicts. A quick look, which leaves out what takes longest:\n"
        "  mwpb-fast trust runs/table1.mwpb_at --subset 200 --without aa,square",
    )
    add = parser.add_argument
    own = _target(parser)
    own += [
        add("--without", metavar="A,B,...", default="", help="attacks to leave out, such as aa,square"),
        add("--control", type=path, metavar="RUN", help="an evaluated run to show beside: that with alpha = 0"),
    ]
    given, request = _read(
        parser, own, arguments, rf"budget(\..*)?|evaluation\.({'|'.join(set(OWN) - {'attacks'})})"
    )

    from mwpb_fast.evaluation.trust import trust_run
    from mwpb_fast.evaluation.trust_report import markdown

    without = [name for name in given.without.split(",") if name]
    lines: list[str] = []
    report = trust_run(request, without=without, control=given.control, tell=lines.append)
    print(markdown(report))
    _close(report, lines, sys.stderr)  # what is printed is the Markdown alone
    return 0


def verify(arguments: Sequence[str]) -> int:
    """check adversarial images that `evaluate` has saved"""
    parser = Parser(
        "verify",
        "Check the adversarial images that `evaluate --save-images` has written, in plain lines, `ok:` or\n"
        "`wrong:`: whether they are in [0, 1], in their balls, and of the model's test set, and whether the\n"
        "model, in full float32, gets right what the file says. A note tells how many are right in 8 bits.",
        "The exit status is 0 where nothing is wrong, else 1.\n"
        "  mwpb-fast verify runs/digits.at/evaluation-best/pgd20-0123456789ab.safetensors runs/digits.at",
    )
    parser.add_argument("file", type=path, metavar="FILE", help="of adversarial images")
    given, request = _read(parser, _target(parser, attacks=False), arguments, r"evaluation\.batch_size")

    from mwpb_fast.evaluation.verify import verify

    checks = verify(given.file, request)
    for holds, text in checks:
        print(f"{'note' if holds is None else 'ok' if holds else 'wrong'}: {text}")
    return int(any(holds is False for holds, _ in checks))


def long_ahead(request: Request) -> None:
    """Where a run's attacks may take longer than its training, says how to leave them for later."""
    attacks = request.evaluation.attacks if request.show and request.evaluation and ranks.leads() else ()
    if long := [name for name in attacks if find_attack(name).long]:
        print(
            f"mwpb-fast: {', '.join(long)} may take longer than the training; it can be stopped, and mwpb-fast "
            f"evaluate {shlex.quote(str(request.target))} goes on; train --no-evaluate leaves it for later",
            file=sys.stderr,
        )


def _close(result: dict[str, Any], lines: Sequence[str], stream: TextIO | None = None) -> None:
    """What is said after a result. lines: for the stream, by default stdout; bytes of paths that are no text are
    shown as numbers."""
    for line in lines:
        print(line.encode(errors="backslashreplace").decode(), file=stream)
    if "made" in result and ranks.leads():
        print(f"mwpb-fast: NOTE: {result['made']}", file=sys.stderr)


def named(text: str) -> str:
    """`module:name`, for argparse."""
    if not is_name(text):
        raise argparse.ArgumentTypeError(f"{text} is no MODULE:NAME, such as mine.nets:test_set")
    return text


def _target(parser: Parser, attacks: bool = True) -> list[argparse.Action]:
    """The words and options of every command that attacks a checkpoint."""
    add = parser.add_argument
    add(
        "target",
        type=path,
        metavar="RUN|FILE|MODULE:NAME",
        help="a run, a checkpoint of one, weights, a model in code (FILE.py:NAME, too)",
    )
    own = [
        add("--eps", metavar="8/255", help="radius (default: the run's)"),
        add("--step-size", metavar="1/255", help="of PGD and CW (default: the run's)"),
        add("--subset", type=whole, metavar="N", help="attack N test images only: a preview"),
        add("--seed", type=whole, default=0, metavar="N", help="of what is random in the attacks (default: 0)"),
    ] * attacks
    own += [
        add("--batch-size", type=whole, metavar="N", help="images at once (default: the run's)"),
        add("--which", choices=["best", "last"], help="of a run's checkpoints (default: best)"),
        add("--device", metavar="cuda:0", help="auto, cpu, cuda or cuda:N (default: the run's)"),
        add("--data-dir", type=path, metavar="DIR", help="holds the prepared data sets (default: the run's)"),
        add("--recipe", metavar="RECIPE", help="of a file of weights; changed by options as in train"),
        add("--weights", metavar="FILE|PLACE", default="",
            help="for a model in code: the FILE that fills it, or FILE:PLACE; for a file of several sets of "
            "weights: the PLACE of one, such as state_dict_ema"),
    ]  # fmt: skip
    return own


def _read(
    parser: Parser, own: Sequence[argparse.Action], arguments: Sequence[str], used: str
) -> tuple[argparse.Namespace, Request]:
    """What the options say, and what is asked for by those that every command here has. used: which of a recipe's
    values matter to this command besides `USED`."""
    given, overrides = parser.parse_with_overrides(own, arguments)
    if overrides and not given.recipe:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    if ":" in given.target.name and not (is_name(given.target) or given.target.exists()):
        raise ConfigError(f"{given.target}: does not exist; code is named MODULE:NAME or FILE.py:NAME")
    if vars(given).get("images") and not is_name(given.target):
        raise ConfigError(f"--images is for a model in code, MODULE:NAME; {given.target} has images of its own")
    config = options.configure(given.recipe, {}, overrides) if given.recipe else None
    values = {name: vars(given).get(name) for name in OWN}
    changes: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    try:
        for name in {"eps", "step_size"} & set(changes):
            changes[name] = parse_radius(changes[name])
        if "attacks" in changes:
            changes["attacks"] = tuple(changes["attacks"].split(","))
        start = config.evaluation if config else _evaluation_of(given.target, changes)
        evaluation = dataclasses.replace(start, **changes)
        options.check_attacks(evaluation if "attacks" in changes else None)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _refuse_idle(given, overrides, used)
    same = {name: vars(given)[name] for name in ("data_dir", "device", "weights")}
    same |= {"seed": vars(given).get("seed", 0)}
    same |= {"images": vars(given).get("images") or "", "save_images": bool(vars(given).get("save_images"))}
    return given, Request(given.target, evaluation, which=given.which or "best", config=config, **same)


def _refuse_idle(given: argparse.Namespace, overrides: Sequence[str], used: str) -> None:
    """Refuse what would be read and then have no effect. used: as `_read` has it."""
    names = [word.removeprefix("--").partition("=")[0] for word in overrides]
    for name in names:
        if not re.fullmatch(f"{USED}|{used}", name):
            raise ConfigError(f"--{name} has no effect here")
    twins = {"device": "precision.device", "data_dir": "data.dir"} | {name: f"evaluation.{name}" for name in OWN}
    for short, long in twins.items():
        if vars(given).get(short) is not None and long in names:
            raise ConfigError(f"--{short.replace('_', '-')} and --{long} are one option: give one of them")
    if given.which and given.target.is_file():
        raise ConfigError(f"--which says which checkpoint of a run's folder; {given.target} is a file")
    if is_name(given.target):
        if given.which:
            raise ConfigError(f"--which is for files; {given.target} is code")
        if model := [name for name in names if name.startswith("model.")]:
            raise ConfigError(f"--{model[0]} has no effect here: {given.target} is the model")
        of_data = [name for name in names if name.startswith("data.")] + ["data-dir"] * (
            given.data_dir is not None
        )
        if of_data and (vars(given).get("images") or not given.recipe):
            raise ConfigError(f"--{of_data[0]} has no effect here: no data set is read")
    idle = [name for name in names if not name.startswith("evaluation.")] + ["weights"] * bool(given.weights)
    if not idle or not given.target.exists():  # there is no file of that name, or it is code
        return
    if given.target.is_file():
        from mwpb_fast.evaluation.checkpoint import own_config, read_weights

        if own_config(*read_weights(given.target, "")) is None:
            return
    raise ConfigError(
        f"{given.target} says itself what model and data it belongs to: --{idle[0]} is for other files"
    )


def _refuse_idle_settings(given: argparse.Namespace, evaluation: EvaluationConfig) -> None:
    """Refuse a setting that none of the attacks has."""
    attacks = [find_attack(name) for name in evaluation.attacks]
    for name, uses in (
        ("eps", [attack.ball and attack.eps is None for attack in attacks]),
        ("step_size", [attack.stepped and attack.step_size is None for attack in attacks]),
        ("costly_subset", [attack.costly for attack in attacks]),
        ("engine", [attack.searches for attack in attacks]),
        ("tf32", [attack.searches for attack in attacks]),
    ):
        if vars(given)[name] is not None and not any(uses):
            raise ConfigError(f"--{name.replace('_', '-')} has no effect on {', '.join(evaluation.attacks)}")


def _evaluation_of(target: Path, changes: dict[str, Any]) -> EvaluationConfig:
    """How the run in a folder, or that which wrote a checkpoint, is to be evaluated; the defaults for a bare file.

    changes: what is asked for instead, and refused before a checkpoint is read.
    """
    if is_name(target):
        return EvaluationConfig()
    if not target.exists():
        raise ConfigError(f"{target}: does not exist")
    if not target.is_dir():
        options.check_attacks(dataclasses.replace(EvaluationConfig(), **changes))

        from mwpb_fast.evaluation.checkpoint import own_config, read_weights

        own = own_config(*read_weights(target, ""))
        return own.evaluation if own else EvaluationConfig()
    saved = target / "config.yaml"
    if not saved.exists():
        raise ConfigError(f"{saved}: missing; is {target} the folder of a run?")
    return options.read_config(saved).evaluation
