"""The grouped matrix products of the class selectors, on the CPU bench for kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

TYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows of each class, dim, outputs: absent and one-row classes, ragged tiles, widths that are no pack
CASES = [([0, 130, 1, 0, 40], 24, 16), ([3, 0, 2], 17, 130), ([1] * 30, 1, 3)]


def rounded(t: Tensor, dtype: torch.dtype, tensor_cores: bool) -> Tensor:
    """What the product sees: float32 on tensor cores keeps 10 bits of mantissa."""
    if dtype == torch.float32 and tensor_cores:
        return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return t


def assert_close(result: Tensor, exact: Tensor, magnitudes: Tensor) -> None:
    """Within the rounding of the result and of a float32 sum of numbers of these magnitudes."""
    allowed = torch.finfo(result.dtype).eps * exact.abs() + 16 * torch.finfo(torch.float32).eps * magnitudes
    assert ((result.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("tensor_cores", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("counts", "dim", "outputs"), CASES)
def test_linear(kernels, way, dtype, tensor_cores, counts, dim, outputs) -> None:
    total = sum(counts)
    ends = torch.tensor(counts).cumsum(0).int()
    rows, weight = torch.randn(total + 3, dim).to(dtype), torch.randn(len(counts), outputs, dim).to(dtype)
    rows[total:] = float("nan")  # rows of no class
    result = torch.full((total + 3, outputs), 7.0, dtype=dtype)
    kernels("grouped_linear").run(
        way, "run_grouped_linear", TYPES.index(dtype), tensor_cores, total + 3, len(counts), dim, outputs, ends, rows,
        weight, result,
    )  # fmt: skip
    label = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    x, w = (rounded(t, dtype, tensor_cores).double() for t in (rows[:total], weight))
    exact = torch.einsum("pd,ped->pe", x, w[label])
    assert_close(result[:total], exact, torch.einsum("pd,ped->pe", x.abs(), w[label].abs()))
    assert (result[total:] == 7).all()


@pytest.mark.parametrize("tensor_cores", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("counts", "dim", "outputs"), [*CASES, ([2100, 3], 8, 8)])
def test_outer(kernels, way, dtype, tensor_cores, counts, dim, outputs) -> None:
    total = sum(counts)
    ends = torch.tensor(counts).cumsum(0).int()
    left, right = torch.randn(total + 3, outputs).to(dtype), torch.randn(total + 3, dim).to(dtype)
    left[total:] = float("nan")
    result = torch.empty(len(counts), outputs, dim, dtype=dtype)
    workspace = torch.empty(4 * (len(counts) + total // 2048 + 1) * outputs * dim, dtype=torch.uint8)
    kernels("grouped_linear").run(
        way, "run_grouped_outer", TYPES.index(dtype), tensor_cores, total + 3, len(counts), outputs, dim, ends, left,
        right, workspace, len(workspace), result,
    )  # fmt: skip
    parts = zip(left[:total].split(counts), right[:total].split(counts), strict=True)
    for got, (one, other) in zip(result, parts, strict=True):
        a, b = (rounded(t, dtype, tensor_cores).double() for t in (one, other))
        assert_close(got, a.t() @ b, a.abs().t() @ b.abs())
