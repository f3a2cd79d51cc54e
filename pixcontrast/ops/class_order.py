"""Rows of a class stand together: label maps in class order, computed once and passed on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_int64
from ..select import labels_at
from . import fake, uses_extension


class Segments(NamedTuple):
    """P rows in the order of their classes: those of class c are ``start[c]`` to ``start[c] + count[c] - 1``.

    Rows without a valid label come behind those of all classes.
    """

    order: Tensor | None
    """``[P]`` int64: position of each row before sorting; ``None``: the rows already stand in class order."""
    labels: Tensor
    """``[P]`` int64: class of each row, in class order; -1: none."""
    start: Tensor
    """``[C]`` int64: first row of each class."""
    count: Tensor  # type: ignore[assignment]  # the field takes the place of tuple.count
    """``[C]`` int64: rows of each class."""
    total: Tensor
    """``[1]`` int64: rows of all classes."""


def class_order(labels: Tensor, num_classes: int, backend: str = "auto") -> Segments:
    """The positions of ``labels``, sorted by class: a stable counting sort on the device of the labels.

    Args:
        labels: int64 of any shape with P < 2^31 elements; outside ``[0, num_classes)`` they are not valid.
        num_classes: C, at least 1. It may be large: ``labels * num_images + image`` sorts by class and image.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.

    Returns:
        :class:`Segments` of the flattened labels; positions of a class ascend, and so do those without a valid label.

    Raises:
        ValueError, TypeError: arguments that do not fit, named.
    """
    _check(labels, num_classes)
    if uses_extension(backend, labels.device, labels.dtype):
        return Segments(*torch.ops.pixcontrast.class_order(labels, num_classes))
    flat = labels.reshape(-1)
    valid = (flat >= 0) & (flat < num_classes)
    bucket = torch.where(valid, flat, num_classes)
    order = torch.argsort(bucket, stable=True)
    count = torch.zeros(num_classes + 1, dtype=torch.int64, device=flat.device)
    count = count.scatter_add(0, bucket, torch.ones_like(bucket))[:-1]
    end = count.cumsum(0)
    return Segments(order, torch.where(valid, flat, -1)[order], end - count, count, end[-1:])


def valid_labels_at(
    labels: Tensor, size: tuple[int, int], num_classes: int, ignore_index: int, backend: str = "auto"
) -> Tensor:
    """Label map at another size by the nearest rule, with -1 for every label that is not valid.

    Cell ``(y, x)`` takes the label at ``(floor(y * H / h), floor(x * W / w))``, as
    :func:`pixcontrast.select.labels_at` does.

    Args:
        labels: ``[B, H, W]`` int64.
        size: ``(h, w)``.
        num_classes: C, at least 1; labels outside ``[0, C)`` are not valid.
        ignore_index: label that is not valid either.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.

    Returns:
        ``[B, h, w]`` int64 in ``[-1, C)``.

    Raises:
        ValueError, TypeError: arguments that do not fit, named.
    """
    _check(labels, num_classes)
    if labels.dim() != 3:
        raise ValueError(f"labels must be [B, H, W], got {tuple(labels.shape)}")
    height, width = size
    if labels.numel() == 0 and labels.shape[0] * height * width > 0:
        raise ValueError(f"labels must have a pixel for each cell of {height} x {width}, got {tuple(labels.shape)}")
    if uses_extension(backend, labels.device, labels.dtype):
        return torch.ops.pixcontrast.labels_at(labels, height, width, num_classes, ignore_index)
    picked = labels_at(labels, size)
    return torch.where((picked >= 0) & (picked < num_classes) & (picked != ignore_index), picked, -1)


def _check(labels: Tensor, num_classes: int) -> None:
    check_int64("labels", labels)
    if not 0 < num_classes < 2**31 - 1:
        raise ValueError(f"num_classes must be within 1..2^31 - 2, got {num_classes}")
    if labels.numel() >= 2**31:
        raise ValueError(f"labels must have fewer than 2^31 elements, got {labels.numel()}")


@fake("labels_at")
def _(labels: Tensor, height: int, width: int, num_classes: int, ignore_index: int) -> Tensor:
    return labels.new_empty((labels.shape[0], height, width))


@fake("class_order")
def _(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sizes = (labels.numel(), labels.numel(), num_classes, num_classes, 1)
    order, sorted_labels, start, count, total = (labels.new_empty(size) for size in sizes)
    return order, sorted_labels, start, count, total
