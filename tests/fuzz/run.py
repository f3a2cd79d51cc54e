"""Cases by seed, in this process, and what they found."""

from __future__ import annotations

import os
import random
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .draw import Draw
from .modules import CALLS

# more of what is quick and of what is widely used
SHARES = {
    "positive_contrast": 12, "contrast_with_mean": 12, "memory_mean": 12, "infonce_contrast": 14, "gather_pixels": 12,
    "unit_rows": 10, "class_order, valid_labels_at": 12, "ClassMemory": 5, "PixelQueues": 3, "PixelContrastLoss": 6,
    "ContrastBranch": 1, "refused arguments": 6,
}  # fmt: skip
MODULES = (
    "ClassMemory",
    "PixelQueues",
    "ContrastBranch",
    "class_order, valid_labels_at",
)  # many threads in all of a case


def function_of(seed: int) -> str:
    return random.Random(f"function {seed}").choices(list(SHARES), list(SHARES.values()))[0]


def case(seed: int, size: int | None = None, function: str | None = None) -> tuple[str, Draw, list[str]]:
    """Function, choices and problems of one case."""
    name, draw = function or function_of(seed), Draw(seed, size)
    before = torch.get_num_threads()
    torch.set_num_threads(draw.threads if name in MODULES else 1)  # judge() sets those of the other functions
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problems = CALLS[name](draw)
    except Exception as error:
        trace, place = error.__traceback__, ""
        while trace is not None:
            place = f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
            trace = trace.tb_next
        problems = [f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:300]}"]
    torch.set_num_threads(before)
    return name, draw, problems


def shrunk(seed: int, size: int, function: str) -> tuple[int, list[str]]:
    """The smallest size at which the case still fails, and how."""
    for smaller in range(size):
        if problems := case(seed, smaller, function)[2]:
            return smaller, problems
    return size, case(seed, size, function)[2]


def run(seeds: Iterable[int], seconds: float = float("inf"), function: str | None = None) -> Iterator[dict[str, Any]]:
    """Reports, a few a second: cases by function and dtype since the one before, and failures."""
    start = reported = time.monotonic()
    cases: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    seed = -1
    for seed in seeds:
        name, draw, problems = case(seed, function=function)
        cases[f"{name}|{str(draw.dtype).removeprefix('torch.')}"] += 1
        if problems:
            size, smaller = shrunk(seed, draw.size, name)
            failures.append({"seed": seed, "size": size, "function": name, "problems": smaller or problems})
        now = time.monotonic()
        if now - reported > 0.5 or now - start > seconds:
            yield {"last": seed, "cases": dict(cases), "failures": failures}
            cases, failures, reported = Counter(), [], now
            if now - start > seconds:
                return
    yield {"last": seed, "cases": dict(cases), "failures": failures}
