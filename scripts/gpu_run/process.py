"""A command in a process group of its own, with a time limit, after which nothing of it is left."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

GRACE = 10.0  # seconds before its limit at which a command is asked to end, so that tests and trainers can sum up
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


def _own_group() -> None:
    """In the child: a process group, the end when this program is killed, and Ctrl-C as the way to ask for the end.

    A group and not a session: whoever ends this program's session is to reach its children too.
    """
    os.setpgid(0, 0)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Process:
    """Starts at once. Call :meth:`ended` often: it is what keeps the limit.

    Attributes:
        status: exit status once ended; ``None`` while running, or if the command could not be started.
        stopped: whether it came to its limit.
        problem: why it could not be started.
    """

    def __init__(self, argv: list[str], log: Path, environment: dict[str, str], folder: Path, limit: float) -> None:
        self.status: int | None = None
        self.stopped = False
        self.problem = ""
        self.start = time.monotonic()
        self._end = self.start + limit
        self._ask = self._end - min(GRACE, limit / 4)
        self._process: subprocess.Popen[bytes] | None = None
        with log.open("ab") as file:
            try:
                self._process = subprocess.Popen(
                    argv, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                    stderr=subprocess.STDOUT, preexec_fn=_own_group,
                )  # fmt: skip
            except (OSError, subprocess.SubprocessError) as error:
                self.problem = f"could not be started: {error}"

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def ended(self) -> bool:
        if self._process is None or self.status is not None:
            return True
        now = time.monotonic()
        if self._has_exited() or now > self._end:
            self.stopped = self.stopped or now > self._end
            self.kill()
            return True
        if now > self._ask and not self.stopped:
            self.stopped = True
            os.kill(self._process.pid, signal.SIGINT)
        return False

    def _has_exited(self) -> bool:
        """Leaves the process there, so that its number cannot be another group's when the group is killed."""
        assert self._process
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> None:
        """Ends the whole group, at once."""
        if self._process is None or self.status is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.status = self._process.wait()
