"""Losses against plain loops in float64, and what they do where no pixel takes part."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from train.losses import entropy_loss, pseudo_label_loss, supervised_loss

IGNORE, CLASSES = 255, 5


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, labels with ignored pixels, confidence, class weights."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, CLASSES, 4, 3, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(CLASSES, (2, 4, 3))
    labels[0, 1], labels[1, 2, 1] = IGNORE, IGNORE
    return logits, labels, torch.rand(2, 4, 3, dtype=torch.float64), torch.rand(CLASSES, dtype=torch.float64) + 0.5


def pixels(labels: Tensor) -> list[tuple[int, int, int]]:
    batch, height, width = labels.shape
    return [(b, y, x) for b in range(batch) for y in range(height) for x in range(width)]


def softmax(logits: Tensor, b: int, y: int, x: int) -> list[float]:
    powers = [math.exp(logits[b, c, y, x].item()) for c in range(logits.shape[1])]
    return [power / sum(powers) for power in powers]


def test_supervised_loss_is_the_weighted_mean_over_labelled_pixels(case):
    logits, labels, _, weights = case
    total = weight = 0.0
    for b, y, x in pixels(labels):
        label = labels[b, y, x].item()
        if label != IGNORE:
            total -= weights[label].item() * math.log(softmax(logits, b, y, x)[label])
            weight += weights[label].item()
    assert supervised_loss(logits, labels, weights, IGNORE).item() == pytest.approx(total / weight, rel=1e-12)


def test_pseudo_label_loss_is_the_mean_over_all_pixels_with_confidence_to_the_sixth(case):
    logits, labels, confidence, weights = case
    total = 0.0
    for b, y, x in pixels(labels):
        label = labels[b, y, x].item()
        if label != IGNORE:
            error = -math.log(softmax(logits, b, y, x)[label])
            total += confidence[b, y, x].item() ** 6 * weights[label].item() * error
    loss = pseudo_label_loss(logits, labels, confidence, weights, IGNORE)
    assert loss.item() == pytest.approx(total / labels.numel(), rel=1e-12)


def test_no_gradient_goes_to_the_confidence(case):
    logits, labels, confidence, weights = case
    confidence.requires_grad_()
    pseudo_label_loss(logits, labels, confidence, weights, IGNORE).backward()
    assert confidence.grad is None and logits.grad.abs().sum() > 0


def test_entropy_loss_is_the_mean_normalised_entropy_over_pixels_with_a_label(case):
    logits, labels, _, _ = case
    total, count = 0.0, 0
    for b, y, x in pixels(labels):
        if labels[b, y, x].item() != IGNORE:
            total -= sum(p * math.log2(p) for p in softmax(logits, b, y, x)) / math.log2(CLASSES)
            count += 1
    assert entropy_loss(logits, labels, IGNORE).item() == pytest.approx(total / count, rel=1e-12)


def test_entropy_of_uniform_and_of_extreme_logits():
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    assert entropy_loss(torch.zeros(1, CLASSES, 2, 2), labels, IGNORE).item() == pytest.approx(1.0)
    logits = torch.full((1, CLASSES, 2, 2), -1e4).index_fill(1, torch.tensor([2]), 1e4).requires_grad_()
    loss = entropy_loss(logits, labels, IGNORE)
    loss.backward()
    assert loss.item() == 0 and logits.grad.isfinite().all()


def test_all_losses_are_connected_zeros_where_everything_is_ignored(case):
    logits, labels, confidence, weights = case
    nothing = torch.full_like(labels, IGNORE)
    for loss in (
        supervised_loss(logits, nothing, weights, IGNORE),
        pseudo_label_loss(logits, nothing, confidence, weights, IGNORE),
        entropy_loss(logits, nothing, IGNORE),
    ):
        logits.grad = None
        loss.backward()
        assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))
