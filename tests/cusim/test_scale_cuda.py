"""Rows scaled to norm one, and gradients multiplied by grad_output in one launch, emulated."""

from __future__ import annotations

import pytest
import torch

from cusim.kernels import WAYS

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "dim"), [(0, 8), (1, 1), (9, 33), (20, 64), (17, 520)])
def test_unit_rows(kernels, way, dtype, rows, dim) -> None:
    given = torch.randn(rows, dim).to(dtype)
    given[3:4], given[5:6] = 0, 1e-14  # zero, and below the floor
    result = torch.full((rows, dim), 7.0, dtype=dtype)
    kernels("scale").run(way, "run_unit_rows", TYPES.index(dtype), rows, dim, given, result)
    norm = given.double().norm(dim=1, keepdim=True)
    expected = torch.where(norm < 1e-12, 0, given.double() / norm)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=eps, atol=eps / 64)


def test_nan_stays_in_its_row(kernels, way) -> None:
    given, result = torch.ones(4, 8), torch.zeros(4, 8)
    given[1, 2], given[2, 0] = torch.nan, torch.inf
    kernels("scale").run(way, "run_unit_rows", 0, 4, 8, given, result)
    assert result[1].isnan().all() and result[2].isnan().any() and result[[0, 3]].isfinite().all()


def test_a_norm_beyond_float32_is_nan(kernels, way) -> None:
    given, result = torch.ones(3, 8), torch.zeros(3, 8)
    given[1], given[2, 0] = 1e19, 1e-20  # 8e38, beyond float32, and a square of zero
    kernels("scale").run(way, "run_unit_rows", 0, 3, 8, given, result)
    assert result[1].isnan().all() and result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("skipped", "count"), [(0, 1), (0, 64), (1, 9), (3, 5000), (7, 20000), (5, 2), (0, 0)])
def test_scales_both_tensors_and_nothing_around_them(kernels, way, dtype, skipped, count) -> None:
    elements, other = torch.randn(skipped + count + 3).to(dtype), torch.randn(77)
    expected, other_expected = elements.clone(), other * -2.5
    expected[skipped : skipped + count] = (expected[skipped : skipped + count].float() * -2.5).to(dtype)
    arguments = (TYPES.index(dtype), elements, skipped, count, 0, other, len(other), torch.tensor([-2.5]))
    kernels("scale").run(way, "run_scale", *arguments)
    assert torch.equal(elements, expected)
    assert torch.equal(other, other_expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_factor_of_one_leaves_even_nan_alone(kernels, way, dtype) -> None:
    elements = torch.full((100,), float("nan")).to(dtype)
    before = elements.view(torch.uint8).clone()
    arguments = (TYPES.index(dtype), elements, 0, 100, 0, torch.zeros(1), 1, torch.ones(1))
    kernels("scale").run(way, "run_scale", *arguments)
    assert torch.equal(elements.view(torch.uint8), before)


@pytest.mark.skipif(WAYS[0].build in ("race", "gpu"), reason="the function runs on the host and reads its arrays there")
def test_shared_memory_is_raised_once_for_each_kernel_device_and_larger_size(kernels) -> None:
    # kernel, device, bytes, status, whether the driver is called
    requests = [
        (1, 0, 50_000, 0, 1),
        (1, 0, 50_000, 0, 0),
        (1, 0, 40_000, 0, 0),
        (2, 0, 50_000, 0, 1),
        (1, 1, 50_000, 0, 1),
        (1, 0, 60_000, 7, 1),  # fails, so the next one tries again
        (1, 0, 60_000, 0, 1),
        (1, 0, 60_000, 0, 0),
    ]
    table = torch.tensor(requests)
    called = torch.full((len(requests),), -1)
    kernels("scale").run(WAYS[0], "run_largest_shared_memory", table[:, :4].contiguous(), len(requests), called)
    assert called.tolist() == table[:, 4].tolist()
