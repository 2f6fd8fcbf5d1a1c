"""The command line: `mwpb-fast COMMAND ...`.

What the user can mend ends with one line on stderr and exit status 2, what the machine or the run could not do
with 1, a signal with 128 plus its number. MWPB_DEBUG=1 or --debug shows tracebacks. Output that nobody takes any
more ends nothing: the files are what counts, except for commands that only print.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Sequence

from mwpb_fast.cli.commands import COMMANDS, PRINTING
from mwpb_fast.config import ConfigError
from mwpb_fast.meant import meant
from mwpb_fast.runs.log import own_version
from mwpb_fast.system import ranks, threads
from mwpb_fast.system.memory import none_left
from mwpb_fast.system.signals import Interrupted, raised
from mwpb_fast.system.streams import Lasting, lasting

SHARED = ("train", "evaluate", "trust")  # what the processes of torchrun do together
APART = ("reproduce",)  # of which each of them does a part by itself
# by name, since the modules that raise them are imported only where they are needed
STATUS = {
    "mwpb_fast.config.schema.ConfigError": 2,
    "mwpb_fast.data.dataset.DataError": 2,
    "mwpb_fast.data.dataset.DataWriteError": 1,
    "mwpb_fast.runs.checkpoint.CheckpointError": 2,
    "mwpb_fast.runs.checkpoint.CheckpointWriteError": 1,
    "mwpb_fast.export.formats.ExportError": 1,
    "mwpb_fast.runs.guards.TrainingError": 1,
    "mwpb_fast.reproduce.launch.LaunchError": 1,
    "mwpb_fast.system.ranks.RanksError": 1,
}


def usage() -> str:
    """What `mwpb-fast --help` shows."""
    lines = ["usage: mwpb-fast COMMAND ...", ""]
    lines += ["Adversarial training with margin-weighted perturbation budgets.", ""]
    lines += [f"  {name + ' ' + words:28s}{command.__doc__}" for name, (words, command) in COMMANDS.items()]
    return "\n".join(
        [*lines, "", "`mwpb-fast COMMAND --help` tells more. -V, --version; --debug shows tracebacks."]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("MWPB_DEBUG") == "1"
    words = [word for word in words if word != "--debug"]
    with lasting() as (out, err):
        try:
            with raised():
                status = _dispatch(words)
            out.flush()
            return status or _unprinted(words, out)
        except SystemExit as leave:  # argparse, after --help
            out.flush()
            return int(leave.code or 0) or _unprinted(words, out)
        except (Exception, KeyboardInterrupt, Interrupted) as error:
            status = _status(error)
            if debug or status == 0:
                raise
            print(f"mwpb-fast: {ranks.label()}{_message(error)}", file=err)
            return status


def _unprinted(words: Sequence[str], out: Lasting) -> int:
    """The exit status of a command that is done but could not say so: 1 where to say it was all there was to do.
    A reader that leaves, such as `head`, has what it wanted."""
    if not out.broken:
        return 0
    asked = not words or words[0] not in COMMANDS or {"-h", "--help"} & set(words)
    print(f"mwpb-fast: standard output: {out.broken}; what should have stood there is lost", file=sys.stderr)
    return int(bool(asked) or " ".join(words[:2]) in PRINTING or words[0] in PRINTING)


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"mwpb-fast {own_version()}")
        return 0
    if words[0] not in COMMANDS:
        raise ConfigError(f"no command {words[0]!r}{meant(words[0], COMMANDS)}")
    if ranks.launched() > 1 and words[0] not in (*SHARED, *APART):
        raise ConfigError(f"{words[0]} is the work of one process: call mwpb-fast {words[0]} without torchrun")
    threads.prepare()
    if os.getcwd() not in sys.path:  # a dotted path may name a module of the user's own; last, so it hides nothing
        sys.path.append(os.getcwd())
    apart = words[0] in APART
    # what all processes of a launch have to say, rank 0 says
    silent = not (apart or ranks.leads())
    with (
        contextlib.redirect_stdout(io.StringIO()) if silent else contextlib.nullcontext(),
        ranks.apart() if apart else contextlib.nullcontext(),
    ):
        return COMMANDS[words[0]][1](words[1:])


def _status(error: BaseException) -> int:
    """The exit status that an error means; 0 for one that nobody foresaw."""
    if isinstance(error, Interrupted):
        return 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]  # the most specific first
    machine = isinstance(error, OSError) or none_left(error)
    return next((STATUS[kind] for kind in kinds if kind in STATUS), int(machine))


def _message(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, Interrupted):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped by SIGINT"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"error: {text}"


if __name__ == "__main__":
    sys.exit(main())
