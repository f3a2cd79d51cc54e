"""Seconds of one step, on the CPU or on a GPU."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from .problem import Step

FLUSHED = 256 << 20  # bytes; more than any GPU's L2 cache


class Clock(Protocol):
    def prepare(self, step: Step) -> Step:
        """The step in the form in which it is timed."""

    def seconds(self, step: Step) -> float:
        """Time of one call."""


class CpuClock:
    def prepare(self, step: Step) -> Step:
        return step

    def seconds(self, step: Step) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start


class CudaClock:
    """Device time between two events, with a cold L2 cache; a replayed graph where the step can be captured."""

    def __init__(self) -> None:
        self.cache = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def prepare(self, step: Step) -> Step:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                results = step()
        except RuntimeError:  # the step waits for the device, or allocates in ways that a graph cannot hold
            torch.cuda.synchronize()
            return step

        def replay() -> dict[str, torch.Tensor]:
            graph.replay()
            return results

        return replay

    def seconds(self, step: Step) -> float:
        self.cache.zero_()
        self.start.record()
        step()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


def clock_of(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()
