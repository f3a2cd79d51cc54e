"""What a contrast branch has learned, as tensors: attention weights of pixels, rows of the memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pixcontrast import ContrastBranch
from pixcontrast.ops.class_order import class_order
from train.errors import UserError
from train.models import Learner
from train.step import to_float


@torch.no_grad()
def attention_map(learner: Learner, image: Tensor) -> tuple[Tensor, Tensor]:
    """Attention weights of the pixels of ``image`` [3, H, W] uint8, each as a pixel of the class predicted for it.

    Args:
        learner: with a branch, in evaluation mode.

    Returns:
        predicted classes [h, w] int64 and weights [h, w] float64, both at the resolution of the features.
    """
    assert learner.branch is not None
    logits, features = learner(to_float(image)[None])
    classes = logits.argmax(1)
    with learner.autocast():
        return classes[0], attention_weights(learner.branch, features, classes)[0]


def attention_weights(branch: ContrastBranch, features: Tensor, labels: Tensor) -> Tensor:
    """Weight of each pixel in the contrast of its class if these images were a batch; its mean in every class is 1.

    The weight is the sigmoid of the logit that the class's feature selector gives to the pixel's predicted row, over
    the mean of these sigmoids over all pixels of the class.

    Args:
        branch: in evaluation mode; its selectors and heads are used.
        features: ``[B, in_channels, h, w]``.
        labels: ``[B, h, w]`` int64; labels outside ``[0, C)`` belong to no class.

    Returns:
        ``[B, h, w]`` float64, NaN where the label belongs to no class.
    """
    segments = class_order(labels, branch.num_classes)
    rows = branch.predict(branch.project(features, segments), segments._replace(order=None))
    logits = branch.select_features(branch.selector_input(rows), segments.start, segments.count)
    weights = _over_mean(logits, segments.labels, branch.num_classes)
    assert segments.order is not None
    return torch.empty_like(weights).scatter_(0, segments.order, weights).view_as(labels)


@dataclass(frozen=True)
class MemoryRows:
    """The filled rows of a memory: rows [M, D] float64, class of each [M], weight of each [M], 1 on average in a class.

    The weights are all 1 in a variant that does not weigh rows.
    """

    rows: Tensor
    classes: Tensor
    weights: Tensor


@torch.no_grad()
def memory_rows(branch: ContrastBranch) -> MemoryRows:
    """The rows in the memory of ``branch``, which is in evaluation mode, class by class.

    Raises:
        UserError: the memory is empty.
    """
    memory = branch.memory
    filled = torch.arange(memory.capacity, device=memory.rows.device) < memory.counts[:, None]
    if not filled.any():
        raise UserError(
            "the memory is empty: train for more than --memory-start steps, or lower --confidence; files of the "
            "authors' code have none"
        )
    classes, rows = filled.nonzero()[:, 0], memory.rows[filled]
    if branch.variant == "released" or branch.objective == "infonce":
        return MemoryRows(rows.double(), classes, torch.ones(len(rows), dtype=torch.float64, device=rows.device))
    logits = branch.memory_weight_logits()[filled]
    return MemoryRows(rows.double(), classes, _over_mean(logits, classes, memory.num_classes))


def _over_mean(logits: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Sigmoid of ``logits [P]`` over its mean in the class of each, float64; NaN for class -1."""
    sigmoids = logits.double().sigmoid()
    groups = torch.where(classes < 0, num_classes, classes)
    sums = sigmoids.new_zeros(num_classes + 1).index_add(0, groups, sigmoids)
    means = sums / torch.bincount(groups, minlength=num_classes + 1)
    return torch.where(classes < 0, torch.nan, sigmoids / means[groups])


def principal_plane(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of ``rows [M, D]`` along the two directions in which they vary most.

    A direction has the sign that makes its largest component positive, so the same rows give the same picture.

    Returns:
        coordinates ``[M, 2]`` of the centred rows, and the share of the variance in each direction ``[2]``; zeros
        where the rows have no second direction.
    """
    centred = rows - rows.mean(0)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    coordinates = centred @ (directions * largest.sign())[:2].t()
    shares = sizes[:2].square() / sizes.square().sum().clamp_min(torch.finfo(rows.dtype).tiny)
    missing = 2 - coordinates.shape[1]
    return pad(coordinates, (0, missing)), pad(shares, (0, missing))
