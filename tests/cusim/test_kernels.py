"""The machinery around kernels: errors of any kind reach the test, and nothing is compiled twice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cusim import build, kernels
from cusim.build import CompileError
from cusim.kernels import KernelError, Kernels, Way

PLAIN = Way("plain", 0)
SOURCE = """
#include "common/cuda/device.cuh"
#include "constant.h"
extern "C" int answer(int64_t* x) { return cu_launch(+[](int64_t* x) { *x += kConstant; }, 1, 1, 0, nullptr, x); }
extern "C" int status(int64_t status) { return status; }
extern "C" int hang() { for (volatile int i = 0;; i = 0) {} }
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := build.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "constant.h").write_text("constexpr int kConstant = 2;")
    (folder / "small.cu").write_text(SOURCE)
    return folder / "small.cu"


@pytest.fixture(scope="module")
def small(source: Path) -> Iterator[Kernels]:
    compiled = Kernels("small", [source])
    yield compiled
    compiled.close()


def test_arrays_change_in_place(small: Kernels) -> None:
    x = np.array([40])
    small.run(PLAIN, "answer", x)
    assert x[0] == 42


def test_errors_end_the_call_and_not_the_next_one(small: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match="status returned 7"):
        small.run(PLAIN, "status", 7)
    with pytest.raises(KernelError, match=r"out of bounds: .* argument 1 of answer"):
        small.run(Way("race", 0), "answer", np.zeros(1, np.int32))
    with pytest.raises(KernelError, match="undefined symbol: unknown"):
        small.run(PLAIN, "unknown")
    with monkeypatch.context() as patient, pytest.raises(KernelError, match="no answer within"):
        patient.setattr(kernels, "SECONDS", 0.5)
        small.run(PLAIN, "hang")
    small.run(PLAIN, "status", 0)


def test_a_tool_may_write_to_the_output_of_the_worker(small: Kernels) -> None:
    noisy = ["sh", "-c", 'echo "========= COMPUTE-SANITIZER"; exec "$@"', "tool"]
    process = kernels._Process(small._libraries.path("plain"), None, noisy)
    assert process.call("status", 0, [0]) == (0, "", [], 0)
    assert process.call("status", 0, [7])[0] == 7
    process.end()


def test_bits_are_compared_within_a_device_only() -> None:
    for on in ("plain asan race", "plain", "gpu"):
        script = "from cusim.kernels import SAME_BITS, WAYS; print(*WAYS[0]); print({way.build for way in SAME_BITS})"
        environment = os.environ | {"CUSIM_RUN_ON": on, "PYTHONPATH": str(build.ROOT / "tests")}
        ran = subprocess.check_output([sys.executable, "-c", script], text=True, env=environment)
        assert ran.splitlines() == [f"{on.split()[0]} 0", str({on.split()[0]})]


def test_everything_is_compiled_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Path] = []
    monkeypatch.setattr(build, "compile_object", lambda source, command: compiled.append(source) or source)
    build.compile_all([])
    wanted = {*(build.ROOT / "csrc").rglob("*.cu"), *build.BENCH.glob("bindings_*.cpp")}
    assert wanted <= {*compiled} and len(compiled) > len(build.BUILDS) * len(wanted)
    compiled.clear()
    build.compile_all(["scale"])
    own = {source.name for source in compiled if not source.is_relative_to(build.RUNTIME)}
    assert "bindings_scale.cpp" in own and len(own) == 2


def test_arrays_must_be_contiguous(small: Kernels) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        small.run(PLAIN, "answer", np.zeros((2, 2), np.int64)[:, 0])


def test_compiled_again_only_when_something_changes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile() -> Path:
        build.compile_object.cache_clear()
        build.text_of.cache_clear()
        return build.compile_object(source, build.BUILDS["plain"].kernel)

    first = compile()
    header = source.with_name("constant.h")
    header.write_text(header.read_text() + "\n")
    second = compile()
    assert first != second
    header.write_text("not C++")
    with pytest.raises(CompileError, match="constant.h"):
        compile()
    header.write_text("constexpr int kConstant = 2;")
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: pytest.fail("compiles again"))
    assert compile() == first
