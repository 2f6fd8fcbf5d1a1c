"""The runs of a table as jobs of a cluster, through submitit; each job is one more process that shares them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mwpb_fast.config import ConfigError
from mwpb_fast.system.optional import attempt

CLUSTERS = ("slurm", "local")
# A job goes on in a new one when its time is over, so that neither is a bound that a run would meet by itself.
MINUTES, TIMEOUTS = 24 * 60, 100
# Of a warning a scheduler leaves 90 seconds, or what --slurm.signal_delay_s says, to the end of the job.
PATIENCE = 75.0


class LaunchError(RuntimeError):
    """The jobs could not be handed over; one line."""


@dataclass
class Worker:
    """What a job does: the command, in a process of its own; submitit calls it, and `checkpoint` before the job
    is put back into the queue. words: after the program's. folder: to work in. devices: CUDA_VISIBLE_DEVICES, or
    `all`; empty where the scheduler says it."""

    words: Sequence[str]
    folder: str
    devices: str = ""
    program: Sequence[str] = (sys.executable, "-m", "mwpb_fast")
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __call__(self) -> None:
        """Raises LaunchError where the command fails."""
        environment = dict(os.environ)
        if self.devices == "all":
            environment.pop("CUDA_VISIBLE_DEVICES", None)
        elif self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices
        self.process = subprocess.Popen(
            [*self.program, *self.words],
            cwd=self.folder,
            env=environment,
            # submitit's warning may come to every process of the job, and is not for this one
            preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
        )
        try:
            while (status := self.process.poll()) is None:
                time.sleep(0.2)
            # a preempted job that SLURM itself ends is queued again, one that leaves before is over
            if status == 128 + signal.SIGTERM and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
                time.sleep(600)
        except BaseException:
            self._stop()
            raise
        if status:
            raise LaunchError(f"mwpb-fast {' '.join(self.words)} ended with status {status}")

    def checkpoint(self, *arguments: Any, **more: Any) -> Any:
        """Have the command save where it is, and say what is to be called in the new job."""
        self._stop()
        submitit = attempt("submitit").module
        assert submitit is not None
        return submitit.helpers.DelayedSubmission(replace(self, process=None))

    def _stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        # unlike a second SIGTERM, which the scheduler may send as well, it does not end the saving
        self.process.send_signal(signal.SIGUSR1)
        end = time.monotonic() + PATIENCE
        # not by poll(), which may be what the handler that calls this has interrupted
        with contextlib.suppress(ChildProcessError):  # it was just taken note of
            while not os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                if time.monotonic() > end:
                    self.process.kill()
                time.sleep(0.1)


def executor(folder: Path, name: str, cluster: str, given: Mapping[str, str]) -> Any:
    """submitit's executor. folder: of its files, the jobs' output among them. given: its parameters as words.
    Raises ConfigError for one that has no meaning here."""
    found = attempt("submitit")
    if found.module is None:
        raise ConfigError(f"--launcher submitit: submitit {found.why}; {found.cure('submitit', 'sweeps')}")
    if cluster == "slurm" and shutil.which("srun") is None:
        raise ConfigError("--launcher submitit: no SLURM here (no srun); --cluster local takes this machine")
    values = {key: _value(text) for key, text in given.items()}
    timeouts = values.pop("max_num_timeout", TIMEOUTS)
    generic = found.module.AutoExecutor._typed_parameters()
    if own := sorted(set(values) - set(generic)) if cluster == "local" else []:
        raise ConfigError(f"--slurm.{own[0]} has no effect with --cluster local")
    if not isinstance(values.get("time", 0), int):
        raise ConfigError(f"--slurm.time takes minutes, not {given['time']}")
    values = {key if key in generic else f"slurm_{key}": value for key, value in values.items()}
    if "slurm_time" not in values:
        values = {"timeout_min": MINUTES} | values
    try:
        made = found.module.AutoExecutor(folder.resolve(), cluster, **{f"{cluster}_max_num_timeout": timeouts})
        made.update_parameters(**{"name": name} | values)
    except (AssertionError, NameError, TypeError, ValueError) as error:  # a parameter that there is not, or not so
        raise ConfigError(f"--launcher submitit: {' '.join(str(error).split('. Valid')[0].split())}") from error
    return made


def submit(made: Any, worker: Worker, count: int) -> list[Any]:
    """So many jobs, on SLURM as an array. Raises LaunchError where the cluster does not take them."""
    try:
        with made.batch():
            return [made.submit(worker) for _ in range(count)]
    except Exception as error:
        raise LaunchError(f"{made.cluster}: the jobs are refused: {' '.join(str(error).split())}") from error


def wait(jobs: Sequence[Any]) -> dict[str, str]:
    """Come back when jobs on this machine are over, with those that failed and where it says why. They end with
    this process."""
    try:
        while not all(job.done() for job in jobs):
            time.sleep(0.2)
    except BaseException:
        for job in jobs:
            job.cancel()
        raise
    return {f"job {job.job_id}": f"see {job.paths.stderr}" for job in jobs if job.exception() is not None}


def words_of(arguments: Sequence[str]) -> list[str]:
    """A command's words without those of the launcher, each of which has a value."""
    found, queue = list[str](), list(arguments)
    while queue:
        word = queue.pop(0)
        if not re.match(r"--(launcher|cluster|jobs|slurm\.[^=]*)(=|$)", word):
            found.append(word)
        elif "=" not in word:
            del queue[:1]
    return found


def _value(text: str) -> Any:
    """Numbers, true and false, lists and objects as JSON has them; all else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
