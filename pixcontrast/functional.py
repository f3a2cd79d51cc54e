"""The operators as functions: arguments checked, one backend chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .checks import (
    check_float,
    check_int64,
    check_key_count,
    check_label_values,
    check_like,
    check_pixels_and_labels,
    check_queue,
    check_range,
)
from .functions import GatherPixels, InfoNCE, MemoryMean, Positive
from .ops import BACKENDS as BACKENDS
from .ops import uses_extension
from .select import Anchors


class PositiveOutput(NamedTuple):
    """Result of :func:`positive_contrast`."""

    loss: Tensor
    """Scalar in the accumulation dtype (float32, or float64 for float64 features)."""
    class_loss: Tensor
    """``[C]``: one minus the weighted mean similarity of each class; 0 where a class takes no part. No gradient."""
    counts: Tensor
    """``[C]`` int64: valid rows of each class."""


def memory_mean(queue: Tensor, counts: Tensor, weight_logits: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Weighted mean unit row of each class of a memory; see :func:`pixcontrast.reference.memory_mean`.

    Args:
        queue: ``[C, N, D]``, a constant (no gradient); the first ``counts[c]`` rows of class c are valid.
        counts: ``[C]`` int64.
        weight_logits: ``[C, N]`` logits of the rows' weights, with gradient; ``None``: all alike.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.

    Returns:
        ``[C, D]`` float32 (float64 for a float64 queue).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, named.
    """
    check_float("queue", queue)
    if queue.dim() != 3:
        raise ValueError(f"queue must be [C, N, D], got {tuple(queue.shape)}")
    check_like("counts", counts, (queue.shape[0],), queue.device)
    check_int64("counts", counts)
    if weight_logits is not None:
        check_like("queue_weight_logits", weight_logits, tuple(queue.shape[:2]), queue.device)
        check_float("queue_weight_logits", weight_logits)
        weight_logits = weight_logits.to(reference.accumulation_dtype(queue.dtype))
    queue = queue.detach()
    if uses_extension(backend, queue.device, queue.dtype):
        if weight_logits is None:  # nothing to differentiate
            return torch.ops.pixcontrast.class_mean(queue, counts, None)
        return MemoryMean.apply(queue, counts, weight_logits)
    return reference.memory_mean(queue, counts, weight_logits)


def positive_contrast(
    features: Tensor,
    labels: Tensor,
    queue: Tensor,
    *,
    queue_counts: Tensor | None = None,
    weight_logits: Tensor | None = None,
    queue_weight_logits: Tensor | None = None,
    ignore_index: int = 255,
    loss_weight: float = 1.0,
    backend: str = "auto",
) -> PositiveOutput:
    """Class-wise contrast of pixels with a memory: positives only, both sides weighted (Alonso et al., Eq. 8).

    ``loss = loss_weight / C * sum_c sum_ij w_i v_j (1 - cos(f_i, z_j))`` with ``w``, ``v`` the sigmoid of the logits
    over their sum within the class. Classes with fewer than two pixels or two memory rows add nothing.

    Args:
        features: ``[P, D]`` or ``[B, D, H, W]`` (contiguous or channels_last), float32, bfloat16, float16 or float64.
        labels: ``[P]`` or ``[B, H, W]`` int64, each in ``[0, C)`` or ``ignore_index``.
        queue: ``[C, N, D]``, a constant.
        queue_counts: ``[C]`` int64, valid rows of each class, first in the queue; ``None``: all.
        weight_logits: logits of the pixels' weights in the shape of ``labels``; ``None``: all alike.
        queue_weight_logits: ``[C, N]`` logits of the memory rows' weights; ``None``: all alike.
        ignore_index: label of pixels that take no part.
        loss_weight: factor of the loss.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.

    Returns:
        :class:`PositiveOutput`. Gradients reach ``features``, ``weight_logits`` and ``queue_weight_logits``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or (on CPU) label values that do not fit, named.
    """
    check_pixels_and_labels(features, labels)
    check_queue(queue, features)
    if queue_counts is None:
        queue_counts = torch.full((queue.shape[0],), queue.shape[1], dtype=torch.int64, device=queue.device)
    mean = memory_mean(queue, queue_counts, queue_weight_logits, backend)
    return contrast_with_mean(
        features,
        labels,
        mean,
        queue_counts,
        weight_logits=weight_logits,
        ignore_index=ignore_index,
        loss_weight=loss_weight,
        backend=backend,
    )


def contrast_with_mean(
    features: Tensor,
    labels: Tensor,
    mean: Tensor,
    counts: Tensor,
    *,
    weight_logits: Tensor | None = None,
    ignore_index: int = 255,
    loss_weight: float = 1.0,
    backend: str = "auto",
) -> PositiveOutput:
    """:func:`positive_contrast` with a memory of which only the class means are known.

    Args:
        mean: ``[C, D]``, the weighted mean unit row of each class, as of :func:`memory_mean`.
        counts: ``[C]`` int64, how many rows each of them is the mean of.
        features, labels, weight_logits, ignore_index, loss_weight, backend: as for :func:`positive_contrast`.

    Returns:
        :class:`PositiveOutput`. Gradients reach ``features``, ``weight_logits`` and ``mean``.

    Raises:
        ValueError, TypeError: as there.
    """
    shape = check_pixels_and_labels(features, labels)
    check_float("mean", mean)
    if mean.dim() != 2 or mean.shape[1] != features.shape[1]:
        raise ValueError(f"mean must be [C, D={features.shape[1]}], got {tuple(mean.shape)}")
    check_like("counts", counts, (mean.shape[0],), features.device)
    check_int64("counts", counts)
    mean = mean.to(reference.accumulation_dtype(features.dtype))
    if weight_logits is not None:
        check_like("weight_logits", weight_logits, shape, features.device)
        check_float("weight_logits", weight_logits)
        weight_logits = weight_logits.to(mean.dtype)
    if not torch.is_grad_enabled():  # a Function is told of leaves that want a gradient all the same
        features, mean = features.detach(), mean.detach()
        weight_logits = None if weight_logits is None else weight_logits.detach()
    if uses_extension(backend, features.device, features.dtype):
        loss, class_loss, pixels, unknown = Positive.apply(
            features, labels, weight_logits, mean, counts, loss_weight, ignore_index
        )
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and unknown.item():
            check_label_values(labels, mean.shape[0], ignore_index, "labels")
        return PositiveOutput(loss, class_loss, pixels)
    check_label_values(labels, mean.shape[0], ignore_index, "labels")
    labels = torch.where(labels == ignore_index, -1, labels)
    return PositiveOutput(*reference.positive(features, labels, weight_logits, mean, counts, loss_weight))


class InfoNCEOutput(NamedTuple):
    """Result of :func:`infonce_contrast`."""

    loss: Tensor
    """Scalar in the accumulation dtype."""
    anchor_loss: Tensor
    """``[R]``: loss of each anchor, 0 where it takes no part. No gradient."""
    positives: Tensor
    """``[R]`` int64: positives of each anchor."""


def infonce_contrast(
    features: Tensor,
    anchors: Anchors,
    queues: Sequence[Tensor] = (),
    *,
    queue_counts: Sequence[Tensor] | None = None,
    excluded: Tensor | None = None,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
    loss_weight: float = 1.0,
    backend: str = "auto",
) -> InfoNCEOutput:
    """Pixel InfoNCE of some pixels with queues, or with each other; see :func:`pixcontrast.reference.infonce`.

    Args:
        features: ``[P, D]`` or ``[B, D, H, W]``, used as they are (normalise them before).
        anchors: which pixels, of which class.
        queues: ``[C, N_q, D]`` each, constants; none: the anchors contrast each other.
        queue_counts: ``[C]`` int64 each, valid rows of each class; ``None``: all.
        excluded: ``[R]`` int64, a key of the own class that is no positive (-1: none).
        temperature: divides the similarities.
        base_temperature: the loss is multiplied by ``temperature / base_temperature``.
        loss_weight: factor of the loss.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.

    Returns:
        :class:`InfoNCEOutput`. The gradient reaches ``features`` alone.

    Raises:
        ValueError, TypeError: arguments that do not fit, named.
    """
    check_float("features", features)
    if features.dim() not in (2, 4):
        raise ValueError(f"features must be [P, D] or [B, D, H, W], got {tuple(features.shape)}")
    for name, value in (("temperature", temperature), ("base_temperature", base_temperature)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    for queue in queues:
        check_queue(queue, features)
        if queue.shape[0] != queues[0].shape[0]:
            raise ValueError(f"queues must have the same classes, got {queues[0].shape[0]} and {queue.shape[0]}")
    if queue_counts is None:
        queue_counts = [torch.full((q.shape[0],), q.shape[1], dtype=torch.int64, device=q.device) for q in queues]
    check_key_count(queues, features.device)
    for queue, counts in zip(queues, queue_counts, strict=True):
        check_like("counts", counts, (queue.shape[0],), queue.device)
        check_int64("counts", counts)
    constants = [queue.detach() for queue in queues]
    features = features if torch.is_grad_enabled() else features.detach()
    if uses_extension(backend, features.device, features.dtype):
        return InfoNCEOutput(
            *InfoNCE.apply(
                features, *anchors, excluded, temperature, base_temperature, loss_weight, *constants, *queue_counts
            )
        )
    return InfoNCEOutput(
        *reference.infonce(
            features, *anchors, constants, queue_counts, excluded, temperature, base_temperature, loss_weight
        )
    )


@torch.no_grad()
def unit_rows(rows: Tensor, backend: str = "auto") -> Tensor:
    """``rows [P, D]`` scaled to norm one, without gradient; rows of norm below 1e-12 become zero.

    Args:
        rows: float32, bfloat16, float16 or float64.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.
    """
    if uses_extension(backend, rows.device, rows.dtype):
        return torch.ops.pixcontrast.unit_rows(rows)
    return reference.unit_rows(rows)


def gather_pixels(features: Tensor, index: Tensor, backend: str = "auto") -> Tensor:
    """Some pixels as rows, ``rows_of(features)[index]``, without copying the others; see
    :func:`pixcontrast.reference.gather_pixels`.

    Args:
        features: ``[P, D]`` or ``[B, D, H, W]`` (contiguous or channels_last), float32, bfloat16, float16 or float64.
        index: ``[R]`` int64, the pixel of each row in ``[0, P)`` (``P = B * H * W``), -1 for none. A pixel may occur
            more than once. On CUDA every value outside ``[0, P)`` means none.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.

    Returns:
        ``[R, D]`` in the dtype of ``features``. A row without pixel is zero and passes no gradient. The gradient
        reaches ``features``; rows of one pixel are added up in their order.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or (on CPU) pixels that do not fit, named.
    """
    check_float("features", features)
    if features.dim() not in (2, 4):
        raise ValueError(f"features must be [P, D] or [B, D, H, W], got {tuple(features.shape)}")
    if index.dim() != 1:
        raise ValueError(f"index must be [R], got {tuple(index.shape)}")
    check_like("index", index, tuple(index.shape), features.device)
    check_int64("index", index)
    check_range("index", index, -1, features.numel() // max(features.shape[1], 1) - 1)
    if uses_extension(backend, features.device, features.dtype):
        return GatherPixels.apply(features, index)
    return reference.gather_pixels(features, index)
