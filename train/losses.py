"""The losses on logits: cross-entropy on labels, cross-entropy on pseudo-labels, entropy.

Without a valid pixel, each is a zero that is connected to the graph. With several processes, all must call them, and
each divides by the mean over the ranks of its divisor. The mean of the results over the ranks is then the loss of the
whole batch, however the valid pixels are spread over the ranks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from train.distributed import mean_over_ranks


def supervised_loss(logits: Tensor, labels: Tensor, class_weights: Tensor, ignore_index: int) -> Tensor:
    """Weighted mean cross-entropy over labelled pixels: ``sum_p a[y_p] ce_p / sum_p a[y_p]``.

    Args:
        logits: [B, C, H, W].
        labels: [B, H, W] int64 in 0..C-1, or ``ignore_index``.
        class_weights: a, [C], in the dtype of the logits.
        ignore_index: label of pixels that are left out.

    Returns:
        a scalar.
    """
    total = F.cross_entropy(logits, labels, class_weights, ignore_index=ignore_index, reduction="sum")
    valid = labels != ignore_index
    weights = mean_over_ranks(torch.where(valid, class_weights[torch.where(valid, labels, 0)], 0).sum())
    # Without a labelled pixel both sums are zero, and 0 / 1 is the loss.
    return total / torch.where(weights > 0, weights, 1)


def pseudo_label_loss(
    logits: Tensor,
    pseudo_labels: Tensor,
    confidence: Tensor,
    class_weights: Tensor,
    ignore_index: int,
    power: float = 6.0,
) -> Tensor:
    """Cross-entropy on pseudo-labels weighted by confidence: ``mean_p q_p^power a[y_p] ce_p``.

    The mean is over all pixels, ignored ones included, whose loss is 0. It is not divided by the weights.

    Args:
        logits: [B, C, H, W] of the student.
        pseudo_labels: [B, H, W] int64 in 0..C-1, or ``ignore_index``.
        confidence: q, [B, H, W], the teacher's largest probability, 0..1; no gradient goes there.
        class_weights: a, [C], in the dtype of the logits.
        ignore_index: label of pixels that are left out.
        power: exponent of the confidence.

    Returns:
        a scalar.
    """
    weighted = F.cross_entropy(logits, pseudo_labels, class_weights, ignore_index=ignore_index, reduction="none")
    return (confidence.detach() ** power * weighted).mean()


def entropy_loss(logits: Tensor, pseudo_labels: Tensor, ignore_index: int) -> Tensor:
    """Entropy of the prediction, from 0 (one class) to 1 (uniform), averaged over pixels that have a pseudo-label.

    Args:
        logits: [B, C, H, W] of the student.
        pseudo_labels: [B, H, W] int64; only whether they are ``ignore_index`` matters.
        ignore_index: label of pixels that are left out.

    Returns:
        a scalar.
    """
    log_probabilities = F.log_softmax(logits, dim=1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(1) / math.log(logits.shape[1])
    valid = pseudo_labels != ignore_index
    count = mean_over_ranks(valid.sum())
    return torch.where(valid, entropy, 0).sum() / torch.where(count > 0, count, 1)
