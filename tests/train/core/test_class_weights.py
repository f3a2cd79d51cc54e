"""Class weights against plain arithmetic."""

from __future__ import annotations

import pytest
import torch

from train.class_weights import ClassWeights


def labels(*counts: int) -> torch.Tensor:
    """A batch with ``counts[c]`` pixels of class c and three ignored ones."""
    values = [c for c, count in enumerate(counts) for _ in range(count)] + [255] * 3
    return torch.tensor(values)[None, :, None]


def test_class_weights_wait_for_both_windows_and_follow_the_median():
    weights = ClassWeights(3, label_batches=2, pseudo_batches=2)
    for step in range(2):
        assert torch.equal(weights.weights(), torch.ones(3))
        weights.count_labels(labels(1, 4, 4))
        weights.count_pseudo(labels(1, 2, 8 * step))
    # frequencies 2+2, 8+4, 8+8: the median is 12
    assert weights.weights().tolist() == pytest.approx([3**0.5, 1, 0.75**0.5])
    weights.count_labels(labels(100, 0, 0))  # the window of the labels is closed
    weights.count_pseudo(labels(7, 2, 0))  # the oldest pseudo-labels (1, 2, 0) fall out: 10, 12, 16
    assert weights.weights().tolist() == pytest.approx([1.2**0.5, 1, 0.75**0.5])


def test_class_weights_of_absent_classes_and_of_labels_only():
    weights = ClassWeights(4, label_batches=1, pseudo_batches=0)
    weights.count_labels(labels(2, 8, 0, 4))
    # median of 2, 8, 0, 4 is 3; the absent class gets the largest ratio of the others
    assert weights.weights().tolist() == pytest.approx([1.5**0.5, 0.375**0.5, 1.5**0.5, 0.75**0.5])


@pytest.mark.parametrize("counts", [(0, 0, 0, 0, 5), (0, 0, 0, 0, 0)])
def test_class_weights_stay_positive_where_most_classes_never_occurred(counts):
    weights = ClassWeights(5, label_batches=1, pseudo_batches=0)
    weights.count_labels(labels(*counts))
    assert torch.equal(weights.weights(), torch.ones(5))


def test_class_weights_go_on_from_their_state():
    first, second = (ClassWeights(3, label_batches=3, pseudo_batches=2) for _ in range(2))
    batches = [labels(1, 2, 3), labels(5, 1, 1), labels(2, 2, 9), labels(1, 1, 1), labels(4, 0, 1)]
    for batch in batches:
        first.count_labels(batch)
        first.count_pseudo(batch)
    for batch in batches[:3]:
        second.count_labels(batch)
        second.count_pseudo(batch)
    third = ClassWeights(3, label_batches=3, pseudo_batches=2)
    third.load_state_dict(second.state_dict())
    for batch in batches[3:]:
        third.count_labels(batch)
        third.count_pseudo(batch)
    assert torch.equal(third.weights(), first.weights()) and not torch.equal(first.weights(), torch.ones(3))
