"""Tensors that have no values: `meta` and fake ones, as tools use them that look at shapes alone. And a forked process."""

from __future__ import annotations

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pixcontrast import ContrastBranch
from pixcontrast.functional import positive_contrast


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_does_not_touch_the_memory_that_its_parent_keeps() -> None:
    """Gradients of 10 MB are in memory that is kept; a fork copies it, and both go on with their own."""

    def gradient(factor: float) -> torch.Tensor:
        features = torch.full((10_000, 256), 1.0).cumsum(0).requires_grad_()
        queue = torch.arange(4.0 * 3 * 256).view(4, 3, 256).cos()
        positive_contrast(features, torch.arange(10_000) % 4, queue, loss_weight=factor).loss.backward()
        assert features.grad is not None
        return features.grad

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork
    try:
        expected, twice = gradient(1.0).clone(), gradient(2.0).clone()
        held = gradient(1.0)
        child = os.fork()
        if child == 0:
            right = torch.equal(gradient(2.0), twice) and torch.equal(held, expected)
            held.fill_(float("nan"))
            os._exit(0 if right and torch.equal(gradient(2.0), twice) else 1)
        again = gradient(1.0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(held, expected) and torch.equal(again, expected)
    finally:
        torch.set_num_threads(threads)
