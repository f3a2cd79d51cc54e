"""Signals that ask a training to stop: Ctrl-C, and the SIGTERM of a scheduler."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pixcontrast.distributed import world_size


@contextmanager
def caught_interrupts() -> Iterator[list[int]]:
    """Context in which the first SIGINT or SIGTERM is only added to the list; a second one has its usual effect.

    With several processes, one in the same second counts as the first: a scheduler signals torchrun and its processes,
    and torchrun signals these again. Python can catch signals in the main thread only; in another, nothing changes.
    """
    caught: list[int] = []
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not caught:
            caught.append(number)
            first = time.monotonic()
        elif world_size() == 1 or time.monotonic() - first > 1:
            signal.signal(number, previous[number])
            signal.raise_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    previous: dict[int, Any] = {int(number): signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
