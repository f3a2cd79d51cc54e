"""Gates for the CUDA kernels where there is nvcc, but no need for a GPU."""

from __future__ import annotations

import re
from concurrent.futures import Future
from pathlib import Path

import pytest
from cusim.build import nvcc
from sass import SHARED_MEMORY, SOURCES, Kernel, compile_all, cuobjdump, kernels, table

TENSOR_CORES, MATRIX_LOAD, ASYNCHRONOUS_COPY = "HMMA", "LDSM", "LDGSTS.*128"
WIDE_LOAD, WIDE_STORE = "LDG.*128", "STG.*128"

# What kernels are built on, by a pattern of their mangled names. None may use local memory.
REQUIRED = {
    r"contrast_rows.*RowShapeILi[48]": [WIDE_LOAD, WIDE_STORE],
    r"sum_rows.*RowShapeILi[48]": [WIDE_LOAD],
    r"project_rows.*RowShapeILi[48]": [WIDE_LOAD],
    r"norm_(forward_dense|backward_apply).*Li[48]E": [WIDE_LOAD, WIDE_STORE],
    r"norm_(stats|backward)_partial.*Li[48]E": [WIDE_LOAD],
    r"unit_rows.*Li[48]E": [WIDE_LOAD, WIDE_STORE],
    r"infonce_forward_mma.*MmaTraitsIf": ["HMMA.*TF32", ASYNCHRONOUS_COPY],
    r"infonce_forward_mma.*MmaTraitsI6__half": [TENSOR_CORES, MATRIX_LOAD, ASYNCHRONOUS_COPY],
    r"infonce_forward_mma.*MmaTraitsI13__nv_bfloat16": ["HMMA.*BF16", MATRIX_LOAD, ASYNCHRONOUS_COPY],
    r"infonce_forward_float32": ["FFMA", "LDS.*128"],
    r"TensorProductI(6__half|13__nv_bfloat16)": [TENSOR_CORES, MATRIX_LOAD, WIDE_LOAD],
    r"TensorProductIf": ["HMMA.*TF32", WIDE_LOAD],
    r"ExactProduct": ["FFMA", WIDE_LOAD],
}

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc (set CUDA_HOME)")
EACH = [
    pytest.param(source, arch, id=f"{source.parent.name}-{source.stem}-{arch}")
    for source in SOURCES
    for arch in SHARED_MEMORY
]


@pytest.fixture(scope="module")
def cubins() -> dict[tuple[Path, str], Future[Path]]:
    return compile_all()


@pytest.fixture
def compiled(cubins: dict[tuple[Path, str], Future[Path]], source: Path, architecture: str) -> list[Kernel]:
    """The kernels of a source, which fails to compile if they spill or need local memory."""
    cubin = cubins[source, architecture].result()
    if cuobjdump() is None:
        pytest.skip("no cuobjdump")
    return kernels(cubin, architecture)


@pytest.mark.parametrize("source, architecture", EACH)
def test_kernels_are_built_on_the_right_instructions(compiled: list[Kernel]) -> None:
    print(table(compiled))
    missing = [
        f"{kernel.name}: no {instruction}"
        for kernel in compiled
        for pattern, instructions in REQUIRED.items()
        for instruction in instructions
        if re.search(pattern, kernel.name) and not kernel.has(instruction)
    ]
    assert not missing
    assert not [kernel.name for kernel in compiled if kernel.has("LDL|STL")]


@pytest.mark.parametrize("source, architecture", EACH)
def test_blocks_fit_on_a_multiprocessor(compiled: list[Kernel]) -> None:
    assert not [kernel.name for kernel in compiled if kernel.blocks < 1]


def test_each_pattern_names_a_kernel(cubins: dict[tuple[Path, str], Future[Path]]) -> None:
    if cuobjdump() is None:
        pytest.skip("no cuobjdump")
    names = [kernel.name for (_, arch), cubin in cubins.items() for kernel in kernels(cubin.result(), arch)]
    assert not [pattern for pattern in REQUIRED if not any(re.search(pattern, name) for name in names)]
