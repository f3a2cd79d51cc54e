"""The graphed branch: on a CPU it makes the same calls without graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from pixcontrast import ContrastBranch, GraphedBranch

CLASSES = 4


def a_batch(device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 12, 8, 9, generator=g)
    labels = torch.randint(0, CLASSES, (2, 16, 18), generator=g)
    logits = torch.nn.functional.one_hot(labels[:, ::2, ::2], CLASSES).permute(0, 3, 1, 2).float() * 12
    return features.to(device), logits.to(device), labels.to(device)


def test_steps_are_those_of_the_branch() -> None:
    check_steps("cpu")


def check_steps(device: str) -> None:
    torch.manual_seed(0)
    branch, teacher = (ContrastBranch(12, CLASSES, dim=16, capacity=8, quota=3).to(device) for _ in range(2))
    plain, plain_teacher = copy.deepcopy(branch), copy.deepcopy(teacher)
    features, logits, labels = a_batch(device, 0)
    before = copy.deepcopy(branch.state_dict())
    graphed = GraphedBranch(branch, features.requires_grad_(), labels, logits=logits, teacher=teacher)
    for name, value in branch.state_dict().items():
        assert torch.equal(value, before[name]), name  # the capture left nothing behind
    branch.zero_grad()
    for step in range(4):
        features, logits, labels = a_batch(device, step + 1)
        mine, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
        graphed.remember(features, logits, labels)
        plain.remember(features, logits, labels, teacher=plain_teacher)
        loss, expected = graphed(mine, labels), plain(theirs, labels)
        (loss * 3).backward()
        (expected * 3).backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(mine.grad, theirs.grad)
    for parameter, other in zip(branch.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)
    torch.testing.assert_close(branch.memory.rows, plain.memory.rows)
    assert list(dict(graphed.named_parameters())) == [f"branch.{name}" for name, _ in branch.named_parameters()]


def test_another_shape_is_refused() -> None:
    features, logits, labels = a_batch("cpu", 0)
    graphed = GraphedBranch(ContrastBranch(12, CLASSES, dim=16), features, labels, logits=logits)
    with pytest.raises(ValueError, match=r"captured with features \(2, 12, 8, 9\) torch.float32, got \(1, 12, 8, 9\)"):
        graphed(features[:1], labels)
    with pytest.raises(ValueError, match=r"captured with labels .* got \(2, 8, 18\)"):
        graphed.remember(features, logits, labels[:, ::2])
    with pytest.raises(ValueError, match="captured with features, logits, labels; got features, labels"):
        graphed.remember(features, None, labels)
