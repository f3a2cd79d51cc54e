"""A loss of zero says why, once, where that costs nothing."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from pixcontrast import ClassMemory, ContrastBranch, PixelContrastLoss

LABELS = torch.arange(64).view(1, 8, 8) % 4


def losses(criterion: PixelContrastLoss, labels: Tensor = LABELS, times: int = 2, **arguments: object) -> list[str]:
    """The warnings of a few calls, whose losses are all zero."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            assert criterion(torch.randn(1, 6, 8, 8), labels, **arguments) == 0
    assert all(warning.filename == __file__ for warning in caught)  # the caller's line, not one of PyTorch
    return [str(warning.message) for warning in caught]


def memory_of(*classes: int) -> ClassMemory:
    memory = ClassMemory(4, 3, 6)
    memory.push(torch.randn(20, 6), torch.tensor(classes * 20)[:20])
    return memory


NO_LABEL = "no pixel has a label that is a class and not ignore_index"


def test_positive() -> None:
    empty, other = ClassMemory(4, 3, 6), memory_of(2, 3)
    low = LABELS % 2
    assert losses(PixelContrastLoss(objective="positive"), queue=empty) == []  # the first step
    (message,) = losses(PixelContrastLoss(objective="positive"), low, queue=other)
    assert "no class has 2 pixels and 2 memory rows: pixels of [0, 1], rows of [2, 3]" in message
    assert "docs/zero_loss.md" in message
    (message,) = losses(PixelContrastLoss(objective="positive"), torch.full_like(low, 255), queue=other)
    assert NO_LABEL in message


def test_infonce() -> None:
    (message,) = losses(PixelContrastLoss())
    assert "more than max_views=100 pixels at the resolution of the features, the largest has 16" in message
    (message,) = losses(PixelContrastLoss(), torch.full_like(LABELS, 255))
    assert NO_LABEL in message
    few = {"max_views": 3, "max_samples": 12}
    (message,) = losses(PixelContrastLoss(**few), LABELS % 2, queue=memory_of(2, 3))
    assert "the queue has no rows of the anchors' classes [0, 1]" in message
    assert losses(PixelContrastLoss(**few), queue=ClassMemory(4, 3, 6)) == []


def test_the_branch() -> None:
    branch = ContrastBranch(6, 4, objective="infonce", dim=6)
    (message,) = losses(branch)  # type: ignore[arg-type]
    assert "max_views=100" in message


@pytest.mark.parametrize("objective", ["positive", "infonce"])
def test_nothing_is_said_without_a_reason_or_where_it_would_cost(objective: str) -> None:
    features, options = torch.randn(1, 6, 8, 8), {"max_views": 3, "max_samples": 12}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="PixelContrastLoss")
        assert PixelContrastLoss(objective=objective, **options)(features, LABELS, queue=memory_of(0, 1, 2, 3)) != 0
        with torch.device("meta"):
            meta = torch.randn(1, 6, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64)
            PixelContrastLoss(objective=objective)(*meta, queue=torch.randn(4, 3, 6))
        compiled = torch.compile(PixelContrastLoss(objective=objective), fullgraph=True, backend="aot_eager")
        compiled(features, torch.full_like(LABELS, 255), queue=memory_of(2, 3))
