"""Everything about rates: EMA of the teacher, ramp of the pseudo-labels, source steps, optimiser and learning rate."""

from __future__ import annotations

import math
import re

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import PolynomialLR

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
"""How often the optimiser of Alonso et al. held a tensor until October 2021: once for each module around it.

SGD that holds a tensor k times updates it k times a step with the same gradient. Once its momentum has settled, that is
k times the learning rate, as the author also says.
"""


def ema_decay(step: int, steps: int, base: float = 0.995, warmup: float = 10.0, schedule: str = "cosine") -> float:
    """Share of the teacher kept after ``step`` (from 0) of ``steps``: ``min(1 - 1/(warmup step + 1), m)``.

    m rises from ``base`` to 1 along a half cosine, or is ``base`` (schedule ``constant``). At step 0 the teacher
    becomes the student.
    """
    cosine = 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2
    return min(1 - 1 / (warmup * step + 1), cosine if schedule == "cosine" else base)


def pseudo_ramp(step: int, length: int, shape: str = "smooth") -> float:
    """Weight of the pseudo-labels at ``step``: 1 from ``length`` on.

    Until then it is ``exp(-5 (1 - step/length)^2)`` (shape ``smooth``) or 0 (``step``).
    """
    if step >= length:
        return 1.0
    return math.exp(-5 * (1 - step / length) ** 2) if shape == "smooth" else 0.0


def from_source(step: int, steps: int, order: str = "alternate", last: int = 100) -> bool:
    """Whether the labelled images of ``step`` (from 0) of ``steps`` are of the source domain.

    Args:
        order: ``alternate``: in every odd step but the ``last`` ones, as the comment in the authors' script says.
            ``last``: in every odd step of the ``last`` ones only, as their last version does.
    """
    return step % 2 == 1 and (step >= steps - last) == (order == "last")


def poly_schedule(optimizer: Optimizer, steps: int) -> PolynomialLR:
    """Learning rate ``lr (1 - step/steps)^0.9``; step it once after every optimiser step."""
    return PolynomialLR(optimizer, total_iters=steps, power=0.9)


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
