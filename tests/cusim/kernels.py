"""Kernels to be called from tests: compiled, and run in a process of their own."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import IO, NamedTuple

import numpy as np
import torch

from cusim.build import BENCH, BUILDS, CXX, ROOT, RUNTIME, Libraries

TOOL = shlex.split(os.environ.get("CUSIM_GPU_TOOL", ""))  # what kernels on a GPU run under
SECONDS = 40 if "gpu" in BUILDS and not TOOL else 120  # until a kernel counts as hanging
ANSWER = b"\0answer\0"  # comes before each answer of the worker; a tool may write to the same pipe before


class Way(NamedTuple):
    """A build (``plain``, ``asan``, ``race`` or ``gpu``) and an order of the threads: 0 first come first served, 1 last
    come first served, from 2 on random with that seed."""

    build: str
    order: int


ORDERS = {"plain": 4, "asan": 1, "race": 2, "gpu": 1}
WAYS = [Way(build, order) for build in BUILDS for order in range(ORDERS[build])]
# ways whose results must agree bit by bit: never the CPU's with the GPU's, whose exponentials and divisions differ
SAME_BITS = [way for way in WAYS if way.build == WAYS[0].build] if "gpu" not in BUILDS else [Way("gpu", 0)] * 3

Array = np.ndarray | torch.Tensor


def grad_dtype(features: torch.Tensor) -> torch.dtype:
    """How kernels store the gradient of features that is multiplied by grad_output later."""
    return torch.float32 if features.dtype == torch.float16 else features.dtype


class KernelError(Exception):
    """What the runtime or a sanitizer found."""


class Kernels:
    """The ``extern "C"`` functions of some sources, which take pointers, int64_t and double and return an int."""

    def __init__(self, name: str, sources: list[Path]) -> None:
        self._libraries = Libraries(name, sources)
        self._processes: dict[str, _Process] = {}
        self.launches: list[int] = []  # of each call, emulated

    def run(self, way: Way, function: str, *arguments: Array | int | float | None) -> None:
        """Calls ``function``, which changes the arrays in place; in the first of the builds if ``way`` names another.

        Arrays (contiguous, any dtype) lie in the device's memory during the call, aligned to 256 bytes and with red
        zones between them. None is a null pointer. ``KernelError`` if anything goes wrong or the function does not
        return 0.
        """
        views = {i: _bytes(argument) for i, argument in enumerate(arguments) if isinstance(argument, Array)}
        passed = [bytes(views[i]) if i in views else argument for i, argument in enumerate(arguments)]
        if way.build not in BUILDS:
            way = WAYS[0]
        if way.build not in self._processes:
            tool = TOOL if way.build == "gpu" else []
            self._processes[way.build] = _Process(self._libraries.path(way.build), BUILDS[way.build].preload, tool)
        status, what, results, launches = self._processes[way.build].call(function, way.order, passed)
        self.launches.append(launches)
        if status:
            self._processes[way.build].end()  # most errors of a GPU stay until the process ends
            raise KernelError(f"{function} returned {status}{what}")
        for view, result in zip(views.values(), results, strict=True):
            view[:] = np.frombuffer(result, np.uint8)

    def close(self) -> None:
        for process in self._processes.values():
            process.end()


def _bytes(array: Array) -> np.ndarray:
    """The memory of a contiguous array, as ``uint8 [bytes]``."""
    if isinstance(array, torch.Tensor):
        if not array.is_contiguous():
            raise ValueError("tensors must be contiguous")
        return array.detach().reshape(-1).view(torch.uint8).numpy()
    if not array.flags.c_contiguous:
        raise ValueError("arrays must be C-contiguous")
    return array.reshape(-1).view(np.uint8)


class _Process:
    """A worker with one library, started when needed and again after each error."""

    def __init__(self, library: Path, preload: str | None, tool: list[str]) -> None:
        self._command = [*tool, sys.executable, str(BENCH / "worker.py"), str(library), ANSWER.hex()]
        self._library = library
        self._environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
        if preload:
            found = subprocess.check_output([CXX, f"-print-file-name={preload}"], text=True)
            self._environment["LD_PRELOAD"] = found.strip()
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process lives

    def call(self, *request: object) -> tuple[int, str, list[bytes], int]:
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, stderr=self._errors, env=self._environment, cwd=ROOT
            )
        assert self._process.stdin and self._process.stdout
        self._errors.truncate(0)
        hanging = Timer(SECONDS, self._process.kill)
        hanging.start()
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            skip_to_answer(self._process.stdout)
            return pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            raise KernelError(self._last_words()) from None
        finally:
            hanging.cancel()

    def _last_words(self) -> str:
        assert self._process
        code = self._process.wait()
        self.end()
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace").lstrip("\0")
        if code == -signal.SIGKILL:
            text += f"killed: no answer within {SECONDS} s"
        elif code < 0:
            text += f"ended by {signal.Signals(-code).name}"
        text = text.replace(f"{ROOT}/", "")
        return re.sub(r"\{(0x[0-9a-f]+)\}", lambda match: source_line(self._library, match[1]), text)

    def end(self) -> None:
        if self._process:
            assert self._process.stdin and self._process.stdout
            with suppress(BrokenPipeError):  # it may have ended
                # It ends by itself, so that a tool that runs it can sum up. A closed pipe would not tell it: processes
                # that other tests have forked hold copies of its end.
                pickle.dump(None, self._process.stdin)
                self._process.stdin.close()
            try:
                self._process.wait(timeout=60 if TOOL else 10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()
        self._process = None


def skip_to_answer(stream: IO[bytes]) -> None:
    """Reads until behind ``ANSWER``; ``EOFError`` without one."""
    read = b""
    while not read.endswith(ANSWER):
        byte = stream.read(1)
        if not byte:
            raise EOFError
        read = (read + byte)[-len(ANSWER) :]


def source_line(library: Path, address: str) -> str:
    """The place in a kernel, with the calls that were inlined there, innermost first: ``a.cuh:3 < b.cu:40``."""
    frames = subprocess.check_output(["addr2line", "-i", "-e", str(library), address], text=True).splitlines()
    places = [frame.split(" (discriminator")[0] for frame in frames]
    own = [place for place in places if place.startswith(str(ROOT)) and not place.startswith(str(RUNTIME))]
    return " < ".join(os.path.relpath(place, ROOT) for place in own or places)
