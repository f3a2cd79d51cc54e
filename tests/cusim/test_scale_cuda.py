"""Gradients multiplied by grad_output in one launch, emulated."""

from __future__ import annotations

import pytest
import torch

from cusim.build import BUILDS
from cusim.kernels import WAYS

TYPES = [torch.float32, torch.bfloat16, torch.float16]


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


@pytest.mark.skipif("gpu" in BUILDS, reason="the function runs on the host and reads its arrays there")
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
