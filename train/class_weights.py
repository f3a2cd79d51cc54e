"""Weights of the classes in the cross-entropies: rare classes weigh more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.distributed import sum_over_ranks


class ClassWeights:
    """Class weights ``sqrt(median frequency / frequency)`` from labels and recent pseudo-labels.

    Label counts come from the first ``label_batches`` batches and stay; pseudo-label counts from the last
    ``pseudo_batches`` ones. Until both windows are full, all weights are 1. A class that never occurred gets the
    largest weight of the others. The median is over all classes, or, where most of them never occurred, over those
    that did.

    Args:
        num_classes: C.
        label_batches: batches of labels to count.
        pseudo_batches: window of the pseudo-labels, in batches; 0 counts labels only.
        device: of the counts; nothing here synchronises with it.

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
        """Count a labelled batch [B, H, W] int64, until the window of the labels is full."""
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
        """Pixel count of each class [C] int64, over all ranks; labels outside 0..C-1 are not counted."""
        flat = labels.reshape(-1)
        inside = (flat >= 0) & (flat < self.num_classes)
        bins = torch.where(inside, flat, self.num_classes)
        counts = torch.zeros(self.num_classes + 1, dtype=torch.int64, device=flat.device)
        return sum_over_ranks(counts.scatter_add_(0, bins, torch.ones_like(bins))[:-1])
