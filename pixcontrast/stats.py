"""What a loss saw: tensors on the device of the features, so that nothing waits for them until they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .functional import InfoNCEOutput
from .reference import accumulation_dtype, as_rows
from .select import Anchors


class ContrastStats(NamedTuple):
    """Statistics of the positive objective."""

    counts: Tensor
    """``[C]`` int64: valid pixels of each class."""
    similarity: Tensor
    """``[C]``: weighted mean cosine similarity of the pixels of each class with its memory; NaN where it has none."""
    memory_fill: Tensor
    """``[C]`` float32: share of the memory's rows that are valid."""


class InfoNCEStats(NamedTuple):
    """Statistics of InfoNCE, for each of R places of anchors; those not taking part have label -1 or no positives."""

    anchors: Tensor
    """Scalar int64: anchors with at least one positive, which the loss is the mean over."""
    labels: Tensor
    """``[R]`` int64: class, -1 for an unused place."""
    positives: Tensor
    """``[R]`` int64: positives."""
    loss: Tensor
    """``[R]``: loss before the temperature ratio and ``loss_weight``."""
    positive_similarity: Tensor
    """``[R]``: mean inner product with the keys of the same class (with itself too, without a queue); NaN for none."""
    negative_similarity: Tensor
    """``[R]``: mean inner product with the keys of other classes; NaN for none."""

    def class_loss(self, num_classes: int) -> Tensor:
        """Mean loss of the anchors of each class ``[num_classes]``; NaN for a class without."""
        index = torch.where((self.labels >= 0) & (self.positives > 0), self.labels, num_classes)
        zeros = self.loss.new_zeros(num_classes + 1)
        total, count = zeros.index_add(0, index, self.loss), zeros.index_add(0, index, torch.ones_like(self.loss))
        return (total / count)[:num_classes]


@torch.no_grad()
def infonce_stats(
    features: Tensor, anchors: Anchors, queues: Sequence[Tensor], counts: Sequence[Tensor], output: InfoNCEOutput
) -> InfoNCEStats:
    """Statistics of one call; similarities come from the sums of the keys of each class, not from pairs."""
    dtype = accumulation_dtype(features.dtype)
    rows = as_rows(features.detach())[anchors.indices.clamp_min(0)].to(dtype)
    used = anchors.indices >= 0
    if queues:
        classes = queues[0].shape[0]
        sums = torch.zeros(classes, features.shape[1], dtype=dtype, device=features.device)
        for queue, count in zip(queues, counts, strict=True):
            valid = (torch.arange(queue.shape[1], device=queue.device) < count[:, None]).to(dtype)
            for c in range(classes):  # class by class, so that no queue is copied whole
                sums[c] += valid[c] @ queue[c].to(dtype)
        number = torch.stack(list(counts)).sum(0).to(dtype)
        index = anchors.labels.clamp(0, classes - 1)
        own_sum, own_number = sums[index], number[index]
        all_sum, all_number = sums.sum(0), number.sum()
    else:
        same = ((anchors.labels[:, None] == anchors.labels) & used[:, None] & used).to(dtype)
        own_sum, own_number = same @ rows, same.sum(1)
        all_sum, all_number = torch.where(used[:, None], rows, 0).sum(0), used.sum()
    positive = (rows * own_sum).sum(1) / own_number
    negative = (rows * (all_sum - own_sum)).sum(1) / (all_number - own_number)
    return InfoNCEStats(
        (output.positives > 0).sum(),
        anchors.labels,
        output.positives,
        output.anchor_loss,
        torch.where(used, positive, float("nan")),
        torch.where(used, negative, float("nan")),
    )
