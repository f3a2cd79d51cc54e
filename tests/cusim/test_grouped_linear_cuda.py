"""The grouped matrix products of the class selectors, emulated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

TYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows of each class, gap behind each, dim, outputs: absent and one-row classes, ragged tiles, widths that are no pack
CASES = [([0, 130, 1, 0, 40], 0, 24, 16), ([3, 0, 2], 2, 17, 130), ([1] * 30, 1, 1, 3)]


def rounded(t: Tensor, dtype: torch.dtype, tensor_cores: bool) -> Tensor:
    """What the product sees: float32 on tensor cores keeps 10 bits of mantissa."""
    if dtype == torch.float32 and tensor_cores:
        return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return t


def assert_close(result: Tensor, exact: Tensor, magnitudes: Tensor) -> None:
    """Within the rounding of the result and of a float32 sum of numbers of these magnitudes."""
    allowed = torch.finfo(result.dtype).eps * exact.abs() + 16 * torch.finfo(torch.float32).eps * magnitudes
    assert ((result.double() - exact).abs() <= allowed).all()


def segments_of(counts: list[int], gap: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """start ``[C]``, count ``[C]``, the class of each row ``[P]`` (-1: none), and P."""
    count = torch.tensor(counts)
    start = (count + gap).cumsum(0) - count - gap
    total = sum(counts) + gap * len(counts) + 3
    label = torch.full((total,), -1)
    for c, first in enumerate(start.tolist()):
        label[first : first + counts[c]] = c
    return start, count, label, total


@pytest.mark.parametrize("tensor_cores", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("counts", "gap", "dim", "outputs"), CASES)
def test_linear(kernels, way, dtype, tensor_cores, counts, gap, dim, outputs) -> None:
    start, count, label, total = segments_of(counts, gap)
    rows, weight = torch.randn(total, dim).to(dtype), torch.randn(len(counts), outputs, dim).to(dtype)
    rows[label < 0] = float("nan")
    result = torch.full((total, outputs), 7.0, dtype=dtype)
    kernels("grouped_linear").run(
        way, "run_grouped_linear", TYPES.index(dtype), tensor_cores, total, len(counts), start, count, dim, outputs,
        rows, weight, result,
    )  # fmt: skip
    used = label >= 0
    x, w = rounded(rows[used], dtype, tensor_cores).double(), rounded(weight, dtype, tensor_cores).double()[label[used]]
    exact = torch.einsum("pd,ped->pe", x, w)
    assert_close(result[used], exact, torch.einsum("pd,ped->pe", x.abs(), w.abs()))
    assert (result[~used] == 7).all()


@pytest.mark.parametrize("tensor_cores", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("counts", "gap", "dim", "outputs"), [*CASES, ([2100, 3], 1, 8, 8)])
def test_outer(kernels, way, dtype, tensor_cores, counts, gap, dim, outputs) -> None:
    start, count, label, total = segments_of(counts, gap)
    left, right = torch.randn(total, outputs).to(dtype), torch.randn(total, dim).to(dtype)
    left[label < 0] = float("nan")
    result = torch.empty(len(counts), outputs, dim, dtype=dtype)
    workspace = torch.empty(4 * (len(counts) + total // 2048 + 1) * outputs * dim, dtype=torch.uint8)
    kernels("grouped_linear").run(
        way, "run_grouped_outer", TYPES.index(dtype), tensor_cores, total, len(counts), start, count, outputs, dim,
        left, right, workspace, len(workspace), result,
    )  # fmt: skip
    for c, got in enumerate(result):
        a, b = (rounded(t[label == c], dtype, tensor_cores).double() for t in (left, right))
        assert_close(got, a.t() @ b, a.abs().t() @ b.abs())


def test_segments_without_start_lie_evenly(kernels) -> None:
    from cusim.kernels import WAYS

    count = torch.tensor([3, 0, 5])
    rows, weight = torch.randn(15, 8), torch.randn(3, 4, 8)
    result = torch.zeros(15, 4)
    kernels("grouped_linear").run(
        WAYS[0], "run_grouped_linear", 0, False, 15, 3, None, count, 8, 4, rows, weight, result
    )
    for c, size in enumerate(count.tolist()):
        segment = slice(5 * c, 5 * c + size)
        torch.testing.assert_close(result[segment], rows[segment] @ weight[c].t())
        assert (result[5 * c + size : 5 * c + 5] == 0).all()
