"""The folder of a run: one program at a time trains in it, and its files are replaced as a whole or not at all."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from train.distributed import rank
from train.errors import UserError, reason

LOCK = "lock"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Context in which no other program trains in the folder ``out``, which is made if it does not exist.

    The lock ends with the process, also after a SIGKILL. It is one of POSIX and not of ``flock()``, which loader
    processes would inherit and hold for some seconds after the end of a killed run.

    Raises:
        UserError: another program trains there, or the folder cannot be written.
    """
    if rank() > 0:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / LOCK, "ab+", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"run folder {out} cannot be written ({error}): choose another --out") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(
                f"process {file.read().decode()} already trains in {out}: wait for its end, or choose another --out"
            ) from None
        except OSError:  # a file system without locks
            pass
        with suppress(OSError):  # the text is only for the message above
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}".encode())
        yield


@contextmanager
def replacing(path: Path, mode: str = "w", keep: Path | None = None) -> Iterator[IO[Any]]:
    """Context of a new file, which becomes ``path`` at the end. After an error, ``path`` is as before.

    At every moment ``path`` is the old or the new file, never a part of it.

    Args:
        path: what to write; a ``.partial`` file beside it is used on the way.
        mode: of ``open()``.
        keep: another name for the file that is at ``path`` now.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            keep.unlink(missing_ok=True)
            try:
                os.link(path, keep)
            except OSError:  # a file system without hard links; for a moment there is no file at path
                os.replace(path, keep)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def not_written(what: str, error: Exception) -> UserError:
    """The error for a file of a run that cannot be written; torch reports a full disk by an error of its own first."""
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    return UserError(f"{what} cannot be written ({reason(cause)}): free space or choose another --out")
