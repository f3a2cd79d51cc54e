"""Schedules against values worked out by hand, class weights against plain arithmetic."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.optim import SGD

from pixcontrast import ContrastBranch
from train.config import OptimConfig
from train.models import Learner
from train.networks import build_network
from train.networks.base import MEANS
from train.schedules import build_optimizer, ema_decay, from_source, poly_schedule, pseudo_ramp, times_listed


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


TIMES = {
    "deeplab_v2": {
        "backbone.conv1.weight": 1, "backbone.layer1.0.conv1.weight": 3, "backbone.layer4.2.conv3.weight": 3,
        "backbone.layer1.0.downsample.0.weight": 4, "classifier.convs.0.weight": 3, "classifier.convs.1.bias": 3,
    },
    "deeplab_v3plus": {
        "backbone.conv1.weight": 1, "backbone.layer3.5.conv2.weight": 3, "backbone.layer2.0.downsample.0.weight": 4,
        "aspp.convs.0.0.weight": 3, "aspp.convs.2.1.bias": 3, "aspp.convs.4.1.weight": 3, "aspp.project.0.weight": 2,
        "aspp.project.1.weight": 2, "skip.0.weight": 2, "skip.1.bias": 2, "decoder.0.0.weight": 3,
        "decoder.1.1.bias": 3, "classifier.weight": 2, "classifier.bias": 2,
    },
}  # fmt: skip


@cache
def learner(network: str) -> Learner:
    with torch.device("meta"):
        model = build_network(network, 19, MEANS["voc"])
        return Learner(model, ContrastBranch(model.feature_channels, 19))


@pytest.mark.parametrize("network", TIMES)
def test_tensors_are_updated_as_often_as_the_authors_optimiser_held_them(network: str):
    names = [name for name, tensor in learner(network).named_parameters() if tensor.requires_grad]
    for name, times in TIMES[network].items():
        assert f"network.{name}" in names and times_listed(f"network.{name}") == times, name
    assert {times_listed(name) for name in names if name.startswith("branch.")} == {2}
    groups = build_optimizer(learner(network), OptimConfig(lr=0.1, repeated_updates=True)).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert [len(group["params"]) for group in groups] == [
        sum(times_listed(name) == times for name in names) for times in (1, 2, 3, 4)
    ]
    assert all(group["momentum"] == 0.9 and group["weight_decay"] == 5e-4 for group in groups)
    (group,) = build_optimizer(learner(network), OptimConfig(lr=0.1)).param_groups
    assert group["lr"] == 0.1 and len(group["params"]) == len(names)


def test_a_tensor_held_three_times_moves_like_one_at_three_times_the_learning_rate():
    """What `repeated_updates` stands for: once the momentum has settled, steps of a constant gradient are as long."""
    held, once = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    single = SGD([once], lr=0.03, momentum=0.9)
    momentum = torch.zeros(1)
    before = 0.0
    for _ in range(300):
        before = (held.item(), once.item())
        for _ in range(3):
            momentum = 0.9 * momentum + 1
            held.data -= 0.01 * momentum
        once.grad = torch.ones(1)
        single.step()
    assert held.item() - before[0] == pytest.approx(once.item() - before[1], rel=1e-3)
