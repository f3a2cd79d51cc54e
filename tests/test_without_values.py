"""Tensors without values, `meta` and fake ones, as tools use them that look at shapes alone."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pixcontrast import ContrastBranch


def step(objective: str, variant: str, capacity: int) -> None:
    sizes = {"max_samples": 16, "max_views": 2} if objective == "infonce" else {"quota": 1}
    branch = ContrastBranch(6, 3, objective=objective, variant=variant, dim=8, capacity=capacity, **sizes)
    features, labels = torch.randn(2, 6, 5, 6, requires_grad=True), torch.zeros(2, 10, 12, dtype=torch.int64)
    if capacity:
        branch.remember(features, torch.randn(2, 3, 5, 6), labels)
    loss, _ = branch(features, labels, return_stats=True)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32
    assert features.grad is not None and features.grad.shape == features.shape
    assert features.grad.device == features.device


CASES = [("positive", "paper", 4), ("positive", "released", 4), ("infonce", "paper", 4), ("infonce", "paper", 0)]


@pytest.mark.parametrize(("objective", "variant", "capacity"), CASES)
def test_the_branch_runs_on_meta_tensors(objective: str, variant: str, capacity: int) -> None:
    with torch.device("meta"):
        step(objective, variant, capacity)


@pytest.mark.parametrize(("objective", "variant", "capacity"), CASES)
def test_the_branch_runs_on_fake_tensors(objective: str, variant: str, capacity: int) -> None:
    with FakeTensorMode():
        step(objective, variant, capacity)
