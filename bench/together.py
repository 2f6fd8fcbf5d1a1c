"""Scripts one after the other in one process, so that libraries are loaded, tuned and warmed up once.

`Together` is the side of the suite, `serve` the process. By its standard input that is given a script's words and
a log, and answers by how the script ended. What the script prints goes to the log, with the traceback of what it
raises. One that hangs or crashes costs the process, and the next script gets a new one.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GRACE = 5.0  # seconds from SIGTERM to SIGKILL


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs and all that it started: SIGTERM, then SIGKILL for what is left."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Together:
    """Runs scripts in one process, made when it is needed. environment: of the process."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root, self.environment = root, environment
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, words: list[str], limit: float, log: Path) -> str:
        """Run a script with these words, its output appended to `log`; why it failed, or nothing. After `limit`
        seconds the process and all that it started are ended."""
        until = time.monotonic() + limit
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"words": words, "log": str(log)}).encode() + b"\n")
            process.stdin.flush()
            answer = self._answer(until)
        except OSError:  # it has gone
            answer = b""
        except BaseException:  # such as Ctrl-C: nothing outlives its stage
            self.close()
            raise
        if answer is None:
            self.close()
            return f"cut off after {limit:.0f} s"
        if not answer:
            process.wait()
            self._process = None
            return f"ended with {process.returncode}"
        code = json.loads(answer)
        return f"ended with {code}" if code else ""

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            end(self._process)
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def _answer(self, until: float) -> bytes | None:
        """A line of the process's; None for none in time, empty where it has ended."""
        assert self._process is not None
        out: Any = self._process.stdout
        while (left := until - time.monotonic()) > 0:
            if select.select([out], [], [], left)[0]:
                return out.readline()
        return None


# the process --------------------------------------------------------------------------------------------------
def run_script(words: list[str]) -> int | None:
    """Run a script as Python would with these words; its exit status, None where the process is to end."""
    before, sys.argv = sys.argv, words
    sys.path[0] = str(Path(words[0]).resolve().parent)
    status: int | None = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as leave:
        if not isinstance(leave.code, int | None):
            print(leave.code, file=sys.stderr)
        status = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except Exception:
        traceback.print_exc()
        status = 1
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a script may have taken it
    return status if tidied() else None


def tidied() -> bool:
    """Leave nothing of a script to the next one; whether there can be one: after an illegal access to its memory a
    device serves no more."""
    torch: Any = sys.modules.get("torch")  # a script need not have imported it
    gc.collect()
    if torch is None:
        return True
    torch.backends.cudnn.benchmark = False
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def serve() -> None:
    """Run what standard input says until it ends, or until the device works no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    asked = os.fdopen(os.dup(0), encoding="utf-8")
    with open(os.devnull, encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 0)
    for line in asked:
        job = json.loads(line)
        with open(job["log"], "a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        status = run_script(job["words"])
        sys.stdout.flush()
        sys.stderr.flush()
        if status is None or status == 128 + signal.SIGTERM:
            sys.exit(status or 1)
        print(status, file=answers, flush=True)


if __name__ == "__main__":
    serve()
