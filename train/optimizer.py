"""The optimiser, with the learning rates that the authors' one amounted to when they made their tables."""

from __future__ import annotations

import re

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from train.config import OptimConfig

TIMES_LISTED = {
    r"network\.backbone\.conv1\.": 1,
    r"network\.backbone\.layer\d\.\d+\.downsample\.": 4,
    r"network\.backbone\.layer": 3,
    r"network\.aspp\.convs\.": 3,
    r"network\.aspp\.project\.": 2,
    r"network\.skip\.": 2,
    r"network\.decoder\.": 3,
    r"network\.classifier\.convs\.": 3,
    r"network\.classifier\.": 2,
    r"branch\.": 2,
}
"""How often the optimiser of Alonso et al. held a tensor until October 2021: once for each module it is nested in.

SGD that holds a tensor k times moves it k times a step with the same gradient. Once its momentum has settled, that is
k times the learning rate; so the author says too.
"""


def build_optimizer(learner: nn.Module, optim: OptimConfig) -> Optimizer:
    """SGD with momentum or AdamW over every trainable tensor, all with weight decay, as in the paper.

    One group at one learning rate; with ``repeated_updates`` a group for each multiple of it, the lowest first.
    """
    tensors = [(name, tensor) for name, tensor in learner.named_parameters() if tensor.requires_grad]
    times = {name: times_listed(name) if optim.repeated_updates else 1 for name, _ in tensors}
    groups = [
        {"params": [tensor for name, tensor in tensors if times[name] == multiple], "lr": multiple * optim.lr}
        for multiple in sorted(set(times.values()))
    ]
    if optim.optimizer == "adamw":
        return AdamW(groups, weight_decay=optim.weight_decay)
    return SGD(groups, momentum=optim.momentum, weight_decay=optim.weight_decay)


def times_listed(name: str) -> int:
    """How often the authors' optimiser held the tensor that is ``name`` in a learner with a network of the paper."""
    return next(times for pattern, times in TIMES_LISTED.items() if re.match(pattern, name))
