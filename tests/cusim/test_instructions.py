"""Instructions and built-ins one by one: what the CPU makes of them and, where there is one, what the GPU does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from cusim.build import BENCH, missing
from cusim.kernels import Kernels, Way


@pytest.fixture(scope="module")
def instructions() -> Iterator[Kernels]:
    if reason := missing():
        pytest.skip(reason)
    kernels = Kernels("instructions", [BENCH / "instructions.cu"])
    yield kernels
    kernels.close()


@pytest.mark.parametrize(
    "name, dtype, inner", [("bf16", torch.bfloat16, 16), ("f16", torch.half, 16), ("tf32", torch.float, 8)]
)
def test_matrix_multiplication(instructions: Kernels, way: Way, name: str, dtype: torch.dtype, inner: int) -> None:
    """Quarters up to 2, whose products and sums are exact in any order."""
    a, b = (torch.randint(-8, 9, shape) / 4 for shape in ((16, inner), (inner, 8)))
    c, d = torch.randint(-8, 9, (16, 8)) / 4, torch.empty(16, 8)
    instructions.run(way, f"run_multiply_{name}", a.to(dtype), b.to(dtype), c, d)
    assert torch.equal(d, a @ b + c)


def test_rounding_to_tf32(instructions: Kernels, way: Way) -> None:
    """To the nearest number of 10 mantissa bits, ties away from zero."""
    ulp = 2.0**-10
    ties = [1 + ulp * (k + 0.5) for k in range(4)]
    near_ties = [1 + ulp * (0.5 + 2.0**-13), 1 + ulp * (0.5 - 2.0**-13)]
    numbers = [*ties, *near_ties, 2 - ulp / 2, 3e38, 1e-40, 0, np.inf, 1 / 3, 1000.1, 7, 1e-30, 2.0**100]
    x = np.array([sign * number for sign in (1, -1) for number in numbers], np.float32)
    bits = np.empty(32, np.uint32)
    instructions.run(way, "run_round_to_tf32", x, bits)
    exponent = np.floor(np.log2(np.maximum(np.abs(x.astype(np.float64)), 2.0**-126)))
    step = np.where(np.isinf(x), 1, 2.0 ** (np.where(np.isinf(exponent), 0, exponent) - 10))
    truth = np.sign(x) * np.floor(np.abs(x.astype(np.float64)) / step + 0.5) * step
    np.testing.assert_array_equal(bits.view(np.float32), truth.astype(np.float32))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_loading_matrices(instructions: Kernels, way: Way, count: int, transposed: bool) -> None:
    matrices = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    registers = np.empty((count, 32), np.uint32)
    instructions.run(way, "run_load_matrices", count, transposed, matrices, registers)
    for m, matrix in enumerate(matrices.transpose(0, 2, 1) if transposed else matrices):
        for lane in range(32):
            row, column = lane // 4, 2 * (lane % 4)
            low, high = (int(number) for number in matrix[row, column : column + 2])
            assert registers[m, lane] == low | high << 16


def test_copying(instructions: Kernels, way: Way) -> None:
    source = np.arange(1, 3 * 32 * 8 + 1, dtype=np.uint16).reshape(3, 32, 8)
    target = np.empty_like(source)
    instructions.run(way, "run_copy", source, target)
    source[2, :, 4:] = 0
    np.testing.assert_array_equal(target, source)


def warp_results(x: list[int]) -> Iterator[Callable[[int], int]]:
    """What lane i gets, in the order of the kernel ``warp_functions``."""
    lanes = range(32)

    def mine(i: int) -> range:
        return range(16) if i < 16 else range(16, 32)

    def bits(chosen: list[int]) -> int:
        return sum(1 << lane for lane in chosen)

    yield lambda i: x[35 % 32]
    yield lambda i: x[i // 8 * 8 + (i + 3) % 8]
    yield lambda i: x[i - 3] if i >= 3 else x[i]
    yield lambda i: x[i + 3] if i % 16 + 3 < 16 else x[i]
    yield lambda i: x[i ^ 5]
    yield lambda i: bits([j for j in mine(i) if x[j] > 0])
    yield lambda i: any(x[j] > 0 for j in lanes)
    yield lambda i: all(x[j] > 0 for j in lanes)
    yield lambda i: bits([j for j in lanes if x[j] == x[i]])
    yield lambda i: bits([*mine(i)]) if all(x[j] == x[i] for j in mine(i)) else 0
    yield lambda i: sum(x)
    yield lambda i: min(x)
    yield lambda i: max(x[j] for j in mine(i))
    yield lambda i: int(np.bitwise_and.reduce(x))
    yield lambda i: int(np.bitwise_or.reduce(x))
    yield lambda i: int(np.bitwise_xor.reduce(x))


@pytest.mark.parametrize("numbers", [[3] * 16 + [-7, 5] * 8, [*range(1, 33)], [-2] * 32, [*range(-20, 12)]], ids=str)
def test_warp_functions(instructions: Kernels, way: Way, numbers: list[int]) -> None:
    results = np.empty((16, 32), np.int32)
    instructions.run(way, "run_warp_functions", np.array(numbers, np.int32), results)
    truth = [[function(lane) for lane in range(32)] for function in warp_results(numbers)]
    np.testing.assert_array_equal(results.view(np.uint32), np.array(truth).astype(np.uint32))


@pytest.mark.parametrize("positive", [0, 5, 32])
def test_block_functions(instructions: Kernels, way: Way, positive: int) -> None:
    results = np.empty((4, 2, 8, 4), np.int32)
    instructions.run(way, "run_block_functions", np.array([1] * positive + [-1] * (32 - positive), np.int32), results)
    for block in range(2):
        places = [[block * 1000 + y * 10 + x for x in range(4)] for y in range(8)]
        np.testing.assert_array_equal(results[0, block], places)
    for found, truth in zip(results[1:], (positive, positive == 32, positive > 0), strict=True):
        assert (found == truth).all()


def test_atomics(instructions: Kernels, way: Way) -> None:
    x = np.random.default_rng(0).integers(-1000, 1000, 32).astype(np.int32)
    totals = np.array([7, 7, 7, 7, -1, 0, 0, 0], np.int32)
    instructions.run(way, "run_atomics", x, totals)
    changes = [np.bitwise_and.reduce(x), np.bitwise_or.reduce(x), np.bitwise_xor.reduce(x), 5]
    assert [*totals] == [7 + x.sum(), 7 - x.sum(), min(7, x.min()), max(7, x.max()), *changes]
