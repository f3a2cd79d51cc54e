"""Seconds of one step, on the CPU or on a GPU."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from .problem import Step

FLUSHED = 256 << 20  # bytes; several times any GPU's L2 cache


class Clock(Protocol):
    def seconds(self, step: Step) -> float:
        """Time of one call."""


class CpuClock:
    def seconds(self, step: Step) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start


class ColdCache:
    """Puts data that no step wants into the L2 cache.

    Written first, then other data read: lines that were only written would have to go to memory while the step is
    timed, at its cost.
    """

    def __init__(self, device: str) -> None:
        self.written, self.read = (torch.zeros(FLUSHED // 4, device=device) for _ in range(2))
        self.total = torch.zeros((), device=device)

    def clear(self) -> None:
        self.written.zero_()
        torch.sum(self.read, dim=0, out=self.total)


class CudaClock:
    """Device time between two events, with a cold L2 cache."""

    def __init__(self) -> None:
        self.cache = ColdCache("cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, step: Step) -> float:
        self.cache.clear()
        self.start.record()
        step()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


def clock_of(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()
