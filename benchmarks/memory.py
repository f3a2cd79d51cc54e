"""Peak memory of one step above its inputs, in a fresh process or in this one."""

from __future__ import annotations

import ctypes
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from pixcontrast import ops

from .cases import CASES, Case
from .problem import Problem, Step
from .released import Checkouts


def peak_mebibytes(
    case: Case, contender: str, device: str, checkouts: Checkouts, threads: int, warm: bool = True
) -> float:
    """Peak of a step above what the inputs take.

    Where it is ``warm``, the second one: the first loads libraries and starts threads, which is little beside what a
    slow step takes.

    On the CPU it is resident memory (Linux), with what the allocator keeps for later; on a GPU what PyTorch allocates.
    """
    context = multiprocessing.get_context("forkserver")  # imports once; every process is forked before any work
    context.set_forkserver_preload(["torch", __name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, case.name, contender, device, checkouts, threads, warm).result()


def _measure(case_name: str, contender: str, device: str, checkouts: Checkouts, threads: int, warm: bool) -> float:
    torch.set_num_threads(threads)
    case = CASES[case_name]
    problem = case.problem(device)
    step = case.contenders_of(problem, checkouts)[contender](problem)
    if warm:
        step()
    return peak_here(problem, step, device)


def peak_here(problem: Problem, step: Step, device: str) -> float:
    """The same in this process, for a step that has been called before if that is to count."""
    problem.forget_gradients()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - allocated) / (1 << 20)
    # freed blocks go back to the system, and count again when they are used again
    ops.release_memory()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
