"""Scaling of gradients by the incoming one, on the CPU bench for kernels."""

from __future__ import annotations

import pytest
import torch

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("skipped", "count"), [(0, 1), (0, 64), (1, 9), (3, 5000), (7, 20000), (5, 2), (0, 0)])
def test_scale(kernels, way, dtype, skipped, count) -> None:
    numbers = torch.randn(skipped + count + 3).to(dtype)
    expected = numbers.clone()
    expected[skipped : skipped + count] = (expected[skipped : skipped + count].float() * -2.5).to(dtype)
    kernels("scale").run(way, "run_scale", TYPES.index(dtype), numbers, skipped, count, torch.tensor([-2.5]))
    assert torch.equal(numbers, expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_factor_of_one_leaves_even_nan_alone(kernels, way, dtype) -> None:
    numbers = torch.full((100,), float("nan")).to(dtype)
    before = numbers.view(torch.uint8).clone()
    kernels("scale").run(way, "run_scale", TYPES.index(dtype), numbers, 0, 100, torch.ones(1))
    assert torch.equal(numbers.view(torch.uint8), before)
