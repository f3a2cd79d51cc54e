"""Class-wise contrast of pixels with a memory: the loss of Alonso et al."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..checks import (
    check_float,
    check_int64,
    check_label_values,
    check_like,
    check_pixels_and_labels,
    check_queue,
    readable,
)
from . import fake, uses_extension
from .autograd import differentiable_once, keep_connected, scaled, unscaled_grad
from .class_mean import memory_mean


class PositiveOutput(NamedTuple):
    """Result of :func:`positive_contrast`."""

    loss: Tensor
    """Scalar in the accumulation dtype (float32, or float64 for float64 features)."""
    class_loss: Tensor
    """``[C]``: one minus the weighted mean similarity of each class; 0 where a class takes no part. No gradient."""
    counts: Tensor
    """``[C]`` int64: valid rows of each class."""


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
    if queue.shape[1] < reference.MIN_ROWS:  # counts beyond N must not make its classes take part
        queue_counts = torch.zeros_like(queue_counts)
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
    if not torch.is_grad_enabled():  # needs_input_grad ignores no_grad
        features, mean = features.detach(), mean.detach()
        weight_logits = None if weight_logits is None else weight_logits.detach()
    if uses_extension(backend, features.device, features.dtype):
        loss, class_loss, pixels, unknown = Positive.apply(
            features, labels, weight_logits, mean, counts, loss_weight, ignore_index
        )
        if readable(labels) and unknown.item():
            check_label_values(labels, mean.shape[0], ignore_index, "labels")
        return PositiveOutput(loss, class_loss, pixels)
    check_label_values(labels, mean.shape[0], ignore_index, "labels")
    labels = torch.where(labels == ignore_index, -1, labels)
    return PositiveOutput(*reference.positive(features, labels, weight_logits, mean, counts, loss_weight))


class Positive(torch.autograd.Function):
    """Loss and all its gradients at once, see :func:`pixcontrast.reference.positive`.

    Forward computes the gradients for ``grad_output = 1``, in its one pass over the features; backward multiplies them
    by ``grad_output``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        labels: Tensor,
        weight_logits: Tensor | None,
        mean: Tensor,
        counts: Tensor,
        loss_weight: float,
        ignore_index: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3])
        loss, class_loss, pixels, unknown, *grads = torch.ops.pixcontrast.positive(
            features, labels, weight_logits, mean, counts, loss_weight, ignore_index, *ctx.needs
        )
        ctx.save_for_backward(*grads)
        keep_connected(ctx, features, weight_logits, mean)
        ctx.dtype = features.dtype
        ctx.mark_non_differentiable(class_loss, pixels, unknown)
        ctx.set_materialize_grads(False)  # allocates no zeros for outputs without gradient
        return loss, class_loss, pixels, unknown

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        features, weight_logits, mean = scaled(saved, ctx.needs, grad_loss, ctx.dtype)
        return features, None, weight_logits, mean, None, None, None


@fake("positive")
def _(
    features: Tensor,
    labels: Tensor,
    weight_logits: Tensor | None,
    mean: Tensor,
    memory_counts: Tensor,
    loss_weight: float,
    ignore_index: int,
    features_grad: bool,
    weight_logits_grad: bool,
    mean_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    classes = mean.shape[0]
    dtype = reference.accumulation_dtype(features.dtype)
    return (
        features.new_empty((), dtype=dtype),
        features.new_empty((classes,), dtype=dtype),
        labels.new_empty((classes,)),
        labels.new_empty(()),
        unscaled_grad(features) if features_grad else features.new_empty(0),
        features.new_empty(labels.shape if weight_logits_grad else 0, dtype=dtype),
        torch.empty_like(mean) if mean_grad else features.new_empty(0, dtype=dtype),
    )
