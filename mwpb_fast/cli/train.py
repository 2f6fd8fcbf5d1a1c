"""The command that trains: what it takes, and what it says before and after."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mwpb_fast import options
from mwpb_fast.cli.attack_commands import long_ahead
from mwpb_fast.cli.parser import Parser
from mwpb_fast.config import Config, ConfigError, axis_name
from mwpb_fast.config.option_values import path
from mwpb_fast.reproduce.plan import schedule
from mwpb_fast.runs.tracker import PACKAGES, require
from mwpb_fast.system import ranks


def train(arguments: Sequence[str]) -> int:
    """train a recipe, attack its best checkpoint, show the result"""
    parser = Parser(
        "train",
        "Train a recipe, or go on with an earlier run of it; then attack its best checkpoint, draw the learning\n"
        "curves and show the accuracies.",
        "Any value of the configuration is set by an option of its name:\n"
        "  mwpb-fast train digits.mwpb_at --epochs 6 --warmup_epochs 4 --optim.drops 4,5 --objective mart\n"
        "`mwpb-fast train RECIPE --help` lists them with that recipe's values.",
    )
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="such as table1.mwpb_at; `mwpb-fast recipes` lists them")
    own = [
        add("--config", type=path, action="append", default=[], metavar="FILE.yaml",
            help="values in place of the recipe's; a run's config.yaml repeats that run"),
        add("--out", type=path, metavar="DIR", help="the run's folder (default: runs/RECIPE)"),
        add("--no-resume", action="store_true", help="begin anew where the folder holds a run"),
        add("--no-evaluate", action="store_true", help="do not attack the trained model"),
        add("--quiet", action="store_true", help="no line while it works, but for what is wrong"),
        add("--json", action="store_true", help="objects in place of lines, for programs"),
        add("--track", choices=PACKAGES, metavar="trackio|wandb", help="send each epoch's record there too"),
    ]  # fmt: skip
    asked = [word for word in arguments if word in ("-h", "--help")]
    given, overrides = parser.parse_with_overrides(own, [word for word in arguments if word not in asked])
    files = {file: options.read_yaml(file) for file in given.config}
    name = given.recipe or next((str(c["recipe"]) for c in files.values() if "recipe" in c), "")
    if asked:
        print(parser.format_help())
        if name:
            print(options.listing(options.configure(name, files, overrides)))
        return 0
    if not name:
        parser.error("which recipe?")
    config = options.configure(name, files, overrides)
    folder = given.out or Path("runs") / config.recipe
    if given.track:
        require(given.track)

    from mwpb_fast import train as training
    from mwpb_fast.runs.view import Form, View

    if not given.no_evaluate:
        options.check_needs(config)
    form: Form = "quiet" if given.quiet else "json" if given.json else "lines"
    view = View(form, given.track or "", unreached(config))
    training.run(config, folder, resume=not given.no_resume, view=view)
    if not given.no_evaluate and (ranks.leads() or (folder / "checkpoints").is_dir()):  # else another machine's
        from mwpb_fast.evaluation.checkpoint import evaluate_run
        from mwpb_fast.evaluation.request import Request
        from mwpb_fast.evaluation.score import format_table

        where, device = config.data.dir, config.precision.device  # the command's: a checkpoint's may be older
        request = Request(folder, config.evaluation, data_dir=where, device=device, show=view.form == "lines")
        long_ahead(request)
        view.result(evaluate_run(request), format_table)  # several processes share its shards
    try:
        if ranks.leads():
            draw([folder], folder, view.form == "lines")
    except ConfigError as error:  # no matplotlib: the run is none the worse
        _note(str(error))
    if ranks.leads() and view.form == "lines":
        print(f"report: mwpb-fast report {shlex.quote(str(folder))}")
    return 0


def unreached(config: Config) -> str:
    """Which part of the schedule lies beyond the last epoch, and what to give instead; empty where none does."""
    epochs, warmup = config.epochs, config.warmup_epochs
    late = [str(epoch) for epoch in config.optim.drops if epoch > epochs]
    fitting = schedule(options.find_recipe(config.recipe), epochs)
    lost, cures = [], []
    if epochs <= warmup:
        lost.append(
            f"none of the {epochs} epochs will have budget {axis_name('budgets', config.budget)} (0 epochs of "
            f"MWPB): all are in the warm-up of {warmup}"
        )
        cures.append(f"--warmup_epochs {fitting.get('warmup_epochs', epochs - 1)}")
    if late:
        drops = ",".join(str(epoch) for epoch in fitting["optim.drops"] if epoch <= epochs)
        lost.append(f"the learning rate will not drop in epoch {' and '.join(late)}, beyond the last of {epochs}")
        cures.append(f"--optim.drops {drops or '[]'}")
    if not lost or not epochs:
        return ""
    return f"{'; '.join(lost)}; --epochs does not scale that: in proportion it is {' '.join(cures)}"


def draw(runs: Sequence[Path], folder: Path, tell: bool = True) -> None:
    """Draw the pictures of runs into a folder. tell: say what the radii are, and which files were written."""
    from mwpb_fast.runs import plots

    for run in runs:
        if tell and (line := plots.read_run(run).radii_line()):
            print(line if len(runs) == 1 else f"{run}: {line}")
    for picture in plots.write(runs, folder):
        if tell:
            print(f"drawn: {picture}")


def _note(text: str) -> None:
    print(f"mwpb-fast: {text}", file=sys.stderr)
