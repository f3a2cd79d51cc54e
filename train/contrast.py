"""The contrast in the training program: the branch of a configuration, what it remembers, and how to watch it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pixcontrast import ContrastBranch
from pixcontrast.branch import rows_per_image
from pixcontrast.queues import PixelQueues
from pixcontrast.select import labels_at, logits_at
from train.config import MethodConfig


def build_branch(
    method: MethodConfig, in_channels: int, num_classes: int, ignore_index: int, num_labelled: int
) -> ContrastBranch:
    """The contrast branch on features of ``in_channels`` channels, of objective and memory of the configuration.

    Args:
        num_classes: C.
        ignore_index: label of pixels without a class.
        num_labelled: labelled images, which decide how many rows each may add to the memory.
    """
    queues = method.memory == "queues"
    options: dict[str, Any] = {
        "objective": method.objective,
        "dim": method.contrast_dim,
        "capacity": 0 if queues else method.memory_rows,
        "variant": method.variant,
        "ignore_index": ignore_index,
        "threshold": method.confidence,
        "loss_weight": method.contrast_weight,
        "temperature": method.temperature,
        "base_temperature": method.base_temperature,
        "max_samples": method.anchors,
        "max_views": method.views,
    }
    if queues:
        return QueueBranch(in_channels, num_classes, method.memory_rows, **options)
    quota = rows_per_image(num_labelled, max(1, method.memory_rows), num_classes if method.voc_quota else None)
    return ContrastBranch(in_channels, num_classes, quota=quota, sync=method.memory_sync, **options)


class QueueBranch(ContrastBranch):
    """InfoNCE against the region and pixel queues of Wang et al., which the student's own embedding fills.

    As in their code, the head runs over all pixels.

    Args:
        rows: of each class in each of the two queues.
        options: of :class:`pixcontrast.ContrastBranch`.
    """

    def __init__(self, in_channels: int, num_classes: int, rows: int, **options: Any) -> None:
        super().__init__(in_channels, num_classes, **options)
        self.queues = PixelQueues(num_classes, rows, self.project.last.out_features, sync="gather")

    def embed(self, features: Tensor) -> Tensor:
        """Unit rows of all pixels of ``features [B, in_channels, h, w]`` as a map ``[B, D, h, w]``."""
        rows = normalize(self.project(features), dim=1)
        return rows.unflatten(0, (features.shape[0], *features.shape[2:])).permute(0, 3, 1, 2)

    def forward(self, features: Tensor, labels: Tensor, predict: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The loss; arguments as for :class:`pixcontrast.ContrastBranch`."""
        return self.criterion(self.embed(features), labels, predict, queue=self.queues.parts())

    @torch.no_grad()
    def fill(self, features: Tensor, labels: Tensor) -> None:
        """Add the regions and some pixels of a batch to the queues."""
        self.queues.update(self.embed(features), labels)


def memory_fill(branch: nn.Module | None) -> Tensor | None:
    """Share ``[C]`` of the memory of each class (with queues, of both) that is filled; None if there is no memory."""
    if isinstance(branch, QueueBranch):
        return torch.stack([queue.fill for queue in branch.queues.parts()]).mean(0)
    return branch.memory.fill if isinstance(branch, ContrastBranch) and branch.capacity > 0 else None


@torch.no_grad()
def adaptive_labels(features: Tensor, logits: Tensor, labels: Tensor, threshold: float, ignore_index: int) -> Tensor:
    """Labels ``[B, h, w]`` of the pixels that are good enough for the memory, ``ignore_index`` elsewhere.

    Good are pixels that the teacher classifies correctly with a probability above ``threshold``, or at least equal to
    the mean over the correctly classified pixels of their class in this batch. So a class of which the teacher is never
    sure is remembered by its surer half.

    Args:
        features: ``[B, D, h, w]``, for their size.
        logits: ``[B, C, h', w']`` of the teacher at any resolution.
        labels: ``[B, H, W]`` int64.
    """
    size = (features.shape[2], features.shape[3])
    label = labels_at(labels, size)
    probability, predicted = logits_at(logits, size, (labels.shape[1], labels.shape[2])).float().softmax(1).max(1)
    correct = (predicted == label).to(probability.dtype)  # an ignored label is no prediction
    sums, counts = probability.new_zeros(2, logits.shape[1])
    sums = sums.index_add(0, predicted.flatten(), (correct * probability).flatten())
    counts = counts.index_add(0, predicted.flatten(), correct.flatten())
    needed = (sums / counts.clamp_min(1)).clamp_max(threshold)[predicted]
    # the mean of equal probabilities may be rounded up
    good = (correct > 0) & ((probability > threshold) | (probability >= needed * (1 - 1e-6)) & (needed < threshold))
    return torch.where(good, label, ignore_index)


def watched(network: nn.Module, losses: dict[str, Tensor], features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Numbers that say whether the contrast does something, as scalars on the device; the graph is kept.

    Args:
        losses: of the step, not yet backpropagated.
        features: ``[B, D, h, w]`` of the student, of the labelled images.
        labels: ``[B, H, W]`` int64.

    Returns:
        ``within`` and ``between``: mean cosine similarity of the features of two different pixels of one class, and of
        two classes; ``gradient_ratio``: norm of the contrast's gradient over that of the cross-entropies, for all
        weights of the network (absent before the contrast begins).
    """
    numbers = dict(zip(("within", "between"), similarities(features.detach(), labels), strict=True))
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    norms = []
    for names in (("contrast_labelled", "contrast_unlabelled"), ("supervised", "pseudo")):
        if terms := [losses[name] for name in names if name in losses]:
            gradients = torch.autograd.grad(
                torch.stack(terms).sum(), weights, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            norms.append(torch.stack([gradient.float().norm() for gradient in gradients]).norm())
    return numbers | ({"gradient_ratio": norms[0] / norms[1]} if len(norms) == 2 else {})


def similarities(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine similarity within classes (over different pixels) and between classes; every class counts alike.

    From the sums of unit features of each class, without pairs. Labels outside ``[0, 255)`` are of no class.
    """
    label = labels_at(labels, (features.shape[2], features.shape[3])).flatten()
    units = normalize(features.float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    index = torch.where((label >= 0) & (label < 255), label, 255)
    sums = units.new_zeros(256, units.shape[1]).index_add(0, index, units)[:255]
    counts = torch.bincount(index, minlength=256)[:255].to(units.dtype)
    squared = units.new_zeros(256).index_add(0, index, units.square().sum(1))[:255]
    pairs = counts * (counts - 1)
    within = torch.where(pairs > 0, (sums.square().sum(1) - squared) / pairs, torch.nan).nanmean()
    means = sums[counts > 0] / counts[counts > 0, None]
    inner = means @ means.t()
    others = len(means) * (len(means) - 1)
    return within, (inner.sum() - inner.diag().sum()) / others if others else torch.full_like(within, torch.nan)
