"""Compiles kernels for the CPU or the GPU; objects and libraries are kept in ``build/cusim``.

``python -m cusim.build [NAME ...]`` compiles all kernels, or those of the named sources, before the tests want them.

Environment:
    CUSIM_RUN_ON: builds to test, separated by spaces: ``plain asan race`` (default), which run on the CPU, or ``gpu``.
    CUSIM_GPU_ARCH: what nvcc compiles for, ``native`` by default, which needs a GPU.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

BENCH = Path(__file__).parent
ROOT = BENCH.parent.parent
RUNTIME = BENCH / "runtime"
CACHE = ROOT / "build" / "cusim"
INCLUDES = (ROOT / "csrc", RUNTIME)
DEFINES = ("-DPIXCONTRAST_WITH_CUDA",)  # headers of operators then declare their launchers

UNUSED = 24 * 3600.0  # seconds after which a file of the cache goes when something takes its place
CXX = os.environ.get("CXX", "g++")  # GNU's: the sanitizers of others have other call-backs
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
RUN_ON = os.environ.get("CUSIM_RUN_ON", "plain asan race").split()
GPU_ARCH = os.environ.get("CUSIM_GPU_ARCH", "native")


class CompileError(Exception):
    """The compiler's complaint."""


def cuda_headers() -> Path | None:
    """Those that PyTorch's triton brings along, which need no toolkit, or the toolkit's."""
    triton = importlib.util.find_spec("triton")
    places = [Path(triton.origin).parent / "backends/nvidia/include"] if triton and triton.origin else []
    return next((place for place in [*places, CUDA_HOME / "include"] if (place / "crt/host_defines.h").exists()), None)


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which(CUDA_HOME / "bin" / "nvcc")


def compilers() -> int:
    """How many to run at once: the processors, shared by the processes of pytest-xdist."""
    return max((os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)), 1)


def missing() -> str | None:
    """What this machine lacks to compile and run the kernels, if anything."""
    if "gpu" in RUN_ON:
        if nvcc() is None:
            return f"no nvcc, neither on the path nor in {CUDA_HOME} (set CUDA_HOME)"
        if GPU_ARCH == "native" and not torch.cuda.is_available():
            return "PyTorch finds no GPU"
        return None
    if shutil.which(CXX) is None:
        return f"no C++ compiler {CXX} (set CXX)"
    if cuda_headers() is None:
        return f"no CUDA headers, neither in triton nor in {CUDA_HOME} (set CUDA_HOME)"
    return None


@dataclass(frozen=True)
class Build:
    """Commands that compile a kernel, compile the runtime, and link; the sanitizer that the process must load first."""

    kernel: tuple[str, ...]
    runtime: tuple[str, ...]
    link: tuple[str, ...]
    sources: tuple[Path, ...] = tuple(sorted(RUNTIME.glob("*.cpp")))
    preload: str | None = None


def _builds() -> dict[str, Build]:
    """Those that tests are to run on, by name."""
    includes = [f"-I{folder}" for folder in INCLUDES]
    # -g1: line numbers and inlined calls are all that reports name; a fifth less to compile
    gnu = (CXX, "-std=c++17", "-g1", "-fPIC", *DEFINES, *includes, f"-isystem{cuda_headers()}", "-xc++")
    asan = (*gnu, "-O1", "-DCUSIM_ASAN", "-fno-sanitize-recover=undefined")
    # The compiler reports every access to race_callbacks.cpp, in place of its own thread sanitizer.
    race = (*gnu, "-O1", "-DCUSIM_RACE", "-fsanitize=thread,alignment,bounds", "-fno-sanitize-recover=undefined")
    link = (CXX, "-shared")
    cuda = nvcc() or "nvcc"
    device = (
        cuda,
        "-std=c++17",
        "-O3",
        "-lineinfo",
        f"-arch={GPU_ARCH}",
        "-Xcompiler=-fPIC",
        *DEFINES,
        includes[0],
        "-x",
        "cu",
    )
    builds = {
        "plain": Build((*gnu, "-O1"), (*gnu, "-O2"), link),
        "asan": Build(
            (*asan, "-fsanitize=address,undefined"),
            (*asan, "-fsanitize=address"),
            (*link, "-fsanitize=address,undefined"),
            preload="libasan.so",
        ),
        "race": Build(race, (*gnu, "-O2", "-DCUSIM_RACE"), (*link, "-Wl,--no-as-needed", "-lubsan")),
        "gpu": Build(device, device, (cuda, "-shared"), (BENCH / "gpu_worker_api.cu",)),
    }
    if unknown := [name for name in RUN_ON if name not in builds]:
        raise ValueError(f"CUSIM_RUN_ON names {unknown[0]!r}, expected some of: {', '.join(builds)}")
    return {name: builds[name] for name in RUN_ON}


BUILDS = _builds()


class Libraries:
    """The shared library of some sources in each build; compilation begins at once, in the background."""

    _compilers = ThreadPoolExecutor(compilers())

    def __init__(self, name: str, sources: list[Path]) -> None:
        self.name = name
        self._objects: dict[str, list[Future[Path]]] = {}
        for key, build in BUILDS.items():
            jobs = [(source, build.kernel) for source in sources] + [
                (source, build.runtime) for source in build.sources
            ]
            self._objects[key] = [self._compilers.submit(compile_object, *job) for job in jobs]

    def path(self, build: str) -> Path:
        """Waits for the compiler and links; ``CompileError`` if it complains."""
        objects = [job.result() for job in self._objects[build]]
        # the names of the objects tell what is in them
        return cached(f"{self.name}-{build}.so", (*BUILDS[build].link, *map(str, objects)), b"")


@cache
def compile_object(source: Path, command: tuple[str, ...]) -> Path:
    return cached(f"{source.stem}.o", (*command, "-c", str(source)), text_of(source))


def cached(name: str, command: tuple[str, ...], inputs: bytes) -> Path:
    """The file that the command writes with ``-o``, from the cache if command, compiler and inputs are the same."""
    key = hashlib.sha256("\0".join([_version(command[0]), *command]).encode() + inputs).hexdigest()[:16]
    stem, suffix = name.split(".")
    result = CACHE / f"{stem}-{key}.{suffix}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with _only_once(result):
        _make(result, stem, suffix, command)
    result.touch()
    return result


@contextmanager
def _only_once(result: Path) -> Iterator[None]:
    """Holds back other processes that want the same file: tests that run in parallel would all compile it."""
    if result.exists():
        yield
        return
    lock = result.with_suffix(".lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        lock.unlink(missing_ok=True)


def _make(result: Path, stem: str, suffix: str, command: tuple[str, ...]) -> None:
    if not result.exists():
        unfinished = result.with_suffix(f".{os.getpid()}.tmp")
        compiled = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        if compiled.returncode:
            raise CompileError(f"{' '.join(command)}\n{compiled.stderr}")
        unfinished.replace(result)
        for old in CACHE.glob(f"{stem}-*.{suffix}"):
            if old.stat().st_mtime < time.time() - UNUSED:
                old.unlink(missing_ok=True)


@cache
def _version(compiler: str) -> str:
    return subprocess.check_output([compiler, "--version"], text=True)


@cache
def text_of(source: Path) -> bytes:
    """The source with all files of the project that it includes, each once."""
    files = [source]
    for file in files:
        for name in re.findall(rb'^#include ["<](.+)[">]', file.read_bytes(), re.MULTILINE):
            found = (folder / name.decode() for folder in (file.parent, *INCLUDES))
            files += [path for path in found if path.exists() and path not in files][:1]
    return b"".join(file.read_bytes() for file in files)


def kernel_sources() -> dict[Path, str]:
    """Every file of kernels and of their bindings, with the name of what it is about."""
    own = [*sorted((ROOT / "csrc").rglob("*.cu")), *sorted(BENCH.glob("bindings_*.cpp")), BENCH / "instructions.cu"]
    return {
        source: source.parent.name if source.stem == "cuda" else source.stem.removeprefix("bindings_") for source in own
    }


def compile_all(names: list[str]) -> int:
    """Compiles the objects of every kernel and of its bindings, or of those named; says how many."""
    wanted = [source for source, name in kernel_sources().items() if not names or name in names]
    jobs = [(source, build.kernel) for build in BUILDS.values() for source in wanted]
    jobs += [(source, build.runtime) for build in BUILDS.values() for source in build.sources]
    with ThreadPoolExecutor(compilers()) as pool:
        for result in pool.map(lambda job: compile_object(*job), jobs):
            print(result.name, flush=True)
    return len(jobs)


if __name__ == "__main__":
    if reason := missing():
        sys.exit(f"cusim: {reason}")
    compile_all(sys.argv[1:])
