"""The commands of the command line: each takes its words and returns the exit status.

Options are read, and refused, before anything heavy is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mwpb_fast.cli import attack_commands, completion, export, reproduce
from mwpb_fast.cli.parser import Parser
from mwpb_fast.cli.train import draw, train
from mwpb_fast.config import ConfigError, all_recipes, load
from mwpb_fast.config.option_values import path
from mwpb_fast.meant import meant


def data(arguments: Sequence[str]) -> int:
    """prepare data sets, or list them"""
    parser = Parser("data", "Data sets: `data list` shows them, `data prepare NAME` makes one ready.")
    add = parser.add_argument
    add("verb", choices=["list", "prepare"], metavar="list|prepare", help="what to do")
    add("name", nargs="?", metavar="NAME", help="of the set to prepare; folder:cats is one of several of its kind")
    add("--dir", type=path, default=Path("data"), help="holds the prepared sets (default: data)")
    add("--from", "--data-dir", dest="source", type=path, metavar="PATH",
        help="the set's archive or folder; without it the set is downloaded, and checked by SHA-256")  # fmt: skip
    add("--encoded", action="store_true", help="keep the image files too, for --data.loader dali to decode")
    add("--offline", action="store_true", help="never download")
    add(
        "--replace", action="store_true", help="put it in the place of another set, or a damaged one, of that name"
    )
    add(
        "--resize",
        metavar="N|WxH",
        help="image files: the shorter side to N, or the image to WxH (Pillow, bicubic)",
    )
    add("--crop", metavar="N|WxH", help="image files: keep the centre, after --resize")
    given = parser.parse_intermixed_args(arguments)

    from mwpb_fast.data.fit import make_fit
    from mwpb_fast.data.prepare import find_set, prepare, set_folder

    if given.verb == "list":
        others = [name for name, value in vars(given).items() if value and name not in ("verb", "dir")]
        if others:
            what = {"name": "NAME", "source": "--from"}.get(others[0], f"--{others[0]}")
            parser.error(f"data list takes --dir alone, not {what}")
        for name in _sets(given.dir):
            print(f"{name:14s} {_state(name, given.dir):26s}{_first_line(find_set(name).__doc__)}")
        return 0
    if not given.name:
        parser.error("which data set?")
    find_set(given.name)
    fit = make_fit(given.resize, given.crop)
    with _downloads() as progress:
        meta = prepare(given.name, source=given.source, dir=given.dir, encoded=given.encoded, fit=fit,
                       offline=given.offline, replace=given.replace, progress=progress, tell=_note)  # fmt: skip
    counts = " and ".join(f"{split['count']:,} {name}" for name, split in meta["splits"].items())
    where = "embedded" if "embedded" in meta else f"in {set_folder(given.dir, given.name)}"
    _say(f"{given.name}: {counts} images of {len(meta['classes'])} classes, {where}")
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """say what this machine has, and what is missing"""
    parser = Parser("doctor", "Devices, the implementation of each op, packages: what is there, what is missing.")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args(arguments)
    from mwpb_fast.cli.doctor import report

    print(report(given.json))
    return 0


def bench(arguments: Sequence[str]) -> int:
    """run a benchmark of a checkout's bench/ folder"""
    folder = Path(__file__).resolve().parents[2] / "bench"
    names = sorted(p.stem for p in folder.glob("*.py") if "__main__" in p.read_text(encoding="utf-8"))
    parser = Parser("bench", f"Run a script of the checkout's bench/ folder: {', '.join(names) or 'none here'}.")
    add = parser.add_argument
    add("name", nargs="?", default="kernels", metavar="NAME", help="of the script (default: kernels)")
    add("rest", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments")
    given = parser.parse_args(arguments)
    if not names:
        raise ConfigError("bench needs a checkout of the repository: the package is installed without its scripts")
    if given.name not in names:
        raise ConfigError(f"no benchmark {given.name!r}{meant(given.name, names)}")
    return subprocess.run([sys.executable, str(folder / f"{given.name}.py"), *given.rest]).returncode


def plot(arguments: Sequence[str]) -> int:
    """draw learning curves and radii of one or more runs"""
    parser = Parser("plot", "Draw curves.png and radii.png; several runs share the pictures.")
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=path, metavar="DIR", help="where to (default: the folder of a single run)")
    given = parser.parse_intermixed_args(arguments)
    if given.out is None and len(given.runs) > 1:
        parser.error("several runs: say where to with --out DIR")
    draw(given.runs, given.out or given.runs[0])
    return 0


def report(arguments: Sequence[str]) -> int:
    """put all about one or more runs into one HTML file"""
    parser = Parser(
        "report",
        "Write one HTML file that needs nothing else: how good a run is and whether that can be believed, its\n"
        "curves, radii, classes, images, evaluations, speed and configuration; several runs stand side by side,\n"
        "with paired differences to the first.",
    )
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=path, metavar="FILE", help="(default: report.html in a single run's folder)")
    parser.add_argument("--no-images", action="store_true", help="leave out what needs checkpoint and data")
    given = parser.parse_intermixed_args(arguments)
    if given.out is None and len(given.runs) > 1:
        parser.error("several runs: say where to with --out FILE.html")

    from mwpb_fast.report.write import write

    _say(f"written: {write(given.runs, given.out or given.runs[0] / 'report.html', images=not given.no_images)}")
    return 0


def recipes(arguments: Sequence[str]) -> int:
    """list the recipes"""
    parser = Parser("recipes", "The recipes: each is a whole configuration, to be trained as it is or changed.")
    parser.parse_args(arguments)
    module = ""
    for name in all_recipes():
        stem, _, function = name.rpartition(".")
        source = load("recipes", stem)
        if stem != module:
            print(f"{'' if not module else chr(10)}{_first_line(source.__doc__)}")
            module = stem
        print(f"  {name:30s}{_first_line(vars(source)[function].__doc__)}")
    return 0


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "train": ("RECIPE", train),
    "evaluate": ("RUN|CHECKPOINT", attack_commands.evaluate),
    "verify": ("FILE RUN|CHECKPOINT", attack_commands.verify),
    "trust": ("RUN|CHECKPOINT", attack_commands.trust),
    "reproduce": ("TABLE", reproduce.reproduce),
    "data": ("list|prepare NAME", data),
    "plot": ("RUN...", plot),
    "export": ("RUN|CHECKPOINT", export.export),
    "report": ("RUN...", report),
    "recipes": ("", recipes),
    "doctor": ("", doctor),
    "bench": ("[NAME]", bench),
    "completion": ("SHELL", completion.completion),
}

PRINTING = ("data list", "recipes", "doctor", "completion")  # all that they do is to print


def _sets(folder: Path) -> list[str]:
    """The names of the known sets, and of those prepared in `folder` under a name of the user's."""
    from mwpb_fast.data.prepare import find_set, known_sets, set_folder

    found = []
    for meta in folder.glob("*/meta.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            name = str(json.loads(meta.read_bytes())["name"])
            if set_folder(folder, name) == meta.parent and find_set(name):
                found.append(name)
    return sorted({*known_sets(), *found})


def _state(name: str, folder: Path) -> str:
    """Whether a data set is at hand."""
    from mwpb_fast.data.prepare import find_set, set_folder

    if hasattr(find_set(name), "images"):
        return "embedded"
    try:
        splits = json.loads((set_folder(folder, name) / "meta.json").read_bytes())["splits"]
        return f"{splits['train']['count']:,} + {splits['test']['count']:,} images"
    except FileNotFoundError:
        return "not prepared"
    except (OSError, ValueError, KeyError, TypeError):
        return "damaged"


@contextlib.contextmanager
def _downloads() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (file, bytes done, bytes in all) that shows the progress of one file after another."""
    from mwpb_fast.runs.log import Progress, progress

    bars: dict[str, Progress] = {}
    with contextlib.ExitStack() as stack:

        def tell(name: str, done: int, total: int) -> None:
            if name not in bars:
                stack.close()
                bars[name] = stack.enter_context(progress(total >> 20, name, "MiB"))
            bars[name].advance((done >> 20) - bars[name].done)

        yield tell


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _say(text: str) -> None:
    """A line with paths in it, of which the bytes that are not text are shown as numbers."""
    print(text.encode(errors="backslashreplace").decode())


def _note(text: str) -> None:
    print(f"mwpb-fast: {text}", file=sys.stderr)
