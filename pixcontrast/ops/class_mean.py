"""Weighted mean unit row of each class of a memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..checks import check_float, check_int64, check_like
from . import fake, uses_extension
from .autograd import differentiable_once


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


class MemoryMean(torch.autograd.Function):
    """Weighted mean unit row of each class, see :func:`pixcontrast.reference.memory_mean`. The queue is a constant."""

    @staticmethod
    def forward(ctx: Any, queue: Tensor, counts: Tensor, weight_logits: Tensor | None) -> Tensor:
        ctx.save_for_backward(queue, counts, weight_logits)
        return torch.ops.pixcontrast.class_mean(queue, counts, weight_logits)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad_mean: Tensor) -> tuple[None, None, Tensor | None]:
        queue, counts, weight_logits = saved
        if not ctx.needs_input_grad[2]:
            return None, None, None
        return None, None, torch.ops.pixcontrast.class_mean_backward(grad_mean, queue, counts, weight_logits)


@fake("class_mean")
def _(queue: Tensor, counts: Tensor, weight_logits: Tensor | None) -> Tensor:
    return queue.new_empty((queue.shape[0], queue.shape[2]), dtype=reference.accumulation_dtype(queue.dtype))


@fake("class_mean_backward")
def _(grad_mean: Tensor, queue: Tensor, counts: Tensor, weight_logits: Tensor) -> Tensor:
    return torch.empty_like(weight_logits, memory_format=torch.contiguous_format)
