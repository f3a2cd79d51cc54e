"""Schedules against values worked out by hand, class weights against plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD

from train.class_weights import ClassWeights
from train.schedules import ema_decay, from_source, poly_schedule, pseudo_ramp


def test_ramp():
    values = [pseudo_ramp(step, 2000) for step in (0, 500, 1000, 1500, 1999, 2000, 9999)]
    assert values == pytest.approx([0.0067379, 0.0600547, 0.2865048, 0.7316156, 0.99999875, 1, 1], rel=1e-5)


def test_ramp_in_one_step():
    assert [pseudo_ramp(step, 2000, "step") for step in (0, 1999, 2000, 9999)] == [0, 0, 1, 1]


def test_ema_with_the_older_warmup():
    assert ema_decay(0, 150000, warmup=1) == 0
    assert ema_decay(1, 150000, warmup=1) == pytest.approx(1 / 2)
    assert ema_decay(19, 150000, warmup=1) == pytest.approx(19 / 20)


def test_steps_with_images_of_the_source():
    assert [step for step in range(10) if from_source(step, 10, last=4)] == [1, 3, 5]
    assert [step for step in range(10) if from_source(step, 10, "last", last=4)] == [7, 9]
    assert sum(from_source(step, 150000) for step in range(150000)) == 74950
    assert sum(from_source(step, 150000, "last") for step in range(150000)) == 50


def test_ema_starts_by_copying_then_follows_the_cosine():
    steps = 150000
    assert ema_decay(0, steps) == 0
    assert ema_decay(1, steps) == pytest.approx(10 / 11)
    assert ema_decay(19, steps) == pytest.approx(1 - 1 / 191)
    assert ema_decay(20, steps) == pytest.approx(0.995, abs=1e-6)
    assert ema_decay(steps // 2, steps) == pytest.approx(0.9975)
    assert ema_decay(steps, steps) == pytest.approx(1 - 1 / (10 * steps + 1))


def test_learning_rate_is_polynomial():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = SGD([parameter], lr=0.2)
    schedule = poly_schedule(optimizer, 50)
    for step in range(50):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * (1 - step / 50) ** 0.9, rel=1e-9)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0


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
