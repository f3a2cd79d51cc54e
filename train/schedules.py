"""What changes with the step: share of the teacher kept, ramp of the pseudo-labels, learning rate, class weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import PolynomialLR

from train.distributed import sum_over_ranks


def ema_decay(step: int, steps: int, base: float = 0.995, warmup: float = 10.0) -> float:
    """Share of the teacher kept after ``step`` (from 0) of ``steps``: ``min(1 - 1/(warmup step + 1), m)``.

    m rises from ``base`` to 1 along a half cosine. At step 0 the teacher becomes the student.
    """
    cosine = 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2
    return min(1 - 1 / (warmup * step + 1), cosine)


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
        order: ``alternate``: in every odd step but the ``last`` ones, as the authors' comment and first version have
            it. ``last``: in every odd step of the ``last`` ones only, which is what their condition came to say.
    """
    return step % 2 == 1 and (step >= steps - last) == (order == "last")


def poly_schedule(optimizer: Optimizer, steps: int) -> PolynomialLR:
    """Learning rate ``lr (1 - step/steps)^0.9``; step it once after every optimiser step."""
    return PolynomialLR(optimizer, total_iters=steps, power=0.9)


class ClassWeights:
    """Class weights ``sqrt(median frequency / frequency)`` from labels and recent pseudo-labels.

    Label counts come from the first ``label_batches`` batches and stay; pseudo-label counts from the last
    ``pseudo_batches`` ones. Until both windows are full, all weights are 1. A class that never occurred gets the
    largest weight of the others. The median is over all classes; where most of them never
    occurred, over those that did.

    Args:
        num_classes: C.
        label_batches: batches of labels to count.
        pseudo_batches: window of the pseudo-labels, in batches; 0 counts labels only.
        device: where the counts live; nothing waits for it.

    With several processes, a batch is that of all ranks together, and all must count equally often.
    """

    def __init__(
        self, num_classes: int, label_batches: int, pseudo_batches: int, device: torch.device | str = "cpu"
    ) -> None:
        self.num_classes = num_classes
        self.label_batches = label_batches
        self.seen = {"labels": 0, "pseudo": 0}
        self.labels = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.pseudo = torch.zeros(pseudo_batches, num_classes, dtype=torch.int64, device=device)

    def count_labels(self, labels: Tensor) -> None:
        """Count a labelled batch [B, H, W] int64, as long as the window of the labels is open."""
        if self.seen["labels"] < self.label_batches:
            self.labels += self._histogram(labels)
            self.seen["labels"] += 1

    def count_pseudo(self, labels: Tensor) -> None:
        """Count a batch of pseudo-labels [B, H, W] int64 in place of the oldest one."""
        window = self.pseudo.shape[0]
        if window > 0:
            self.pseudo[self.seen["pseudo"] % window] = self._histogram(labels)
            self.seen["pseudo"] += 1

    @property
    def ready(self) -> bool:
        """Whether both windows have been filled."""
        return self.seen["labels"] >= self.label_batches and self.seen["pseudo"] >= self.pseudo.shape[0]

    def weights(self) -> Tensor:
        """Weights [C] float32."""
        if not self.ready:
            return torch.ones(self.num_classes, device=self.labels.device)
        # float32 holds counts up to 2^24 exactly and larger ones to 1e-7, and MPS has no float64
        counts = (self.labels + self.pseudo.sum(0)).float()
        occurs = counts > 0
        median = torch.quantile(counts, 0.5)
        median = torch.where(median > 0, median, torch.where(occurs, counts, torch.nan).nanmedian())
        ratio = torch.where(occurs, median / counts.clamp_min(1), 1)
        return torch.where(occurs, ratio, ratio.max()).nan_to_num(1).sqrt()

    def state_dict(self) -> dict[str, Any]:
        return {"seen": dict(self.seen), "labels": self.labels, "pseudo": self.pseudo}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = dict(state["seen"])
        self.labels.copy_(state["labels"])
        self.pseudo.copy_(state["pseudo"])

    def _histogram(self, labels: Tensor) -> Tensor:
        """Pixels of each class [C] int64, over all ranks; labels outside 0..C-1 count nowhere."""
        flat = labels.reshape(-1)
        inside = (flat >= 0) & (flat < self.num_classes)
        slots = torch.where(inside, flat, self.num_classes)
        counts = torch.zeros(self.num_classes + 1, dtype=torch.int64, device=flat.device)
        return sum_over_ranks(counts.scatter_add_(0, slots, torch.ones_like(slots))[:-1])
