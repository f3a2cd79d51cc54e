"""Ctrl-C that ends a training between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interrupted(Exception):
    """The training was interrupted and has written its checkpoint; the message says how to go on."""


class CatchInterrupt:
    """Context in which SIGINT sets ``requested`` instead of raising; a second one raises KeyboardInterrupt as usual.

    Elsewhere than in the main thread, Python cannot catch signals and nothing changes.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> CatchInterrupt:
        self.active = threading.current_thread() is threading.main_thread()
        if self.active:
            self.previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            signal.signal(signal.SIGINT, self.previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
