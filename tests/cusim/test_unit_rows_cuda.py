"""Rows scaled to norm one, emulated."""

from __future__ import annotations

import pytest
import torch

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "dim"), [(0, 8), (1, 1), (9, 33), (20, 64), (17, 520)])
def test_unit_rows(kernels, way, dtype, rows, dim) -> None:
    given = torch.randn(rows, dim).to(dtype)
    given[3:4], given[5:6] = 0, 1e-14  # zero, and below the floor
    result = torch.full((rows, dim), 7.0, dtype=dtype)
    kernels("unit_rows").run(way, "run_unit_rows", TYPES.index(dtype), rows, dim, given, result)
    norm = given.double().norm(dim=1, keepdim=True)
    expected = torch.where(norm < 1e-12, 0, given.double() / norm)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=eps, atol=eps / 64)


def test_nan_stays_in_its_row(kernels, way) -> None:
    given, result = torch.ones(4, 8), torch.zeros(4, 8)
    given[1, 2], given[2, 0] = torch.nan, torch.inf
    kernels("unit_rows").run(way, "run_unit_rows", 0, 4, 8, given, result)
    assert result[1].isnan().all() and result[2].isnan().any() and result[[0, 3]].isfinite().all()


def test_a_norm_beyond_float32_is_nan(kernels, way) -> None:
    given, result = torch.ones(3, 8), torch.zeros(3, 8)
    given[1], given[2, 0] = 1e19, 1e-20  # 8e38, beyond float32, and a square of zero
    kernels("unit_rows").run(way, "run_unit_rows", 0, 3, 8, given, result)
    assert result[1].isnan().all() and result[[0, 2]].isfinite().all()
