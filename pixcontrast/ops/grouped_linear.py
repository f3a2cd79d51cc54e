"""Matrix products of rows in segments, each segment with a matrix of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import fake, uses_extension
from .autograd import differentiable_once


def grouped_linear(rows: Tensor, weight: Tensor, start: Tensor | None, count: Tensor, backend: str = "auto") -> Tensor:
    """``rows[i] @ weight[c].T`` for the rows i of segment c.

    Args:
        rows: ``[P, D]``.
        weight: ``[C, E, D]`` in the dtype of ``rows``.
        start: ``[C]`` int64, first row of each segment; ``None``: segments lie ``P / C`` rows apart.
        count: ``[C]`` int64, rows of each segment.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.

    Returns:
        ``[P, E]``; rows outside of all segments may hold anything. Gradients reach ``rows`` and ``weight``.
    """
    if uses_extension(backend, rows.device, rows.dtype):
        return GroupedLinear.apply(rows, weight, start, count)
    return reference.grouped_linear(rows, weight, start, count)


class GroupedLinear(torch.autograd.Function):
    """See :func:`grouped_linear`. ``drows_i = weight_c^T g_i``, ``dweight_c = sum_i g_i rows_i^T``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, start: Tensor | None, count: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, start, count)
        return torch.ops.pixcontrast.grouped_linear(rows, start, count, weight)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, start, count = saved
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            transposed = weight.transpose(1, 2).contiguous()
            product = torch.ops.pixcontrast.grouped_linear(grad, start, count, transposed)
            grad_rows = torch.where(reference.members(len(rows), start, count).any(1)[:, None], product, 0)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.ops.pixcontrast.grouped_outer(grad, rows, start, count)
        return grad_rows, grad_weight, None, None


@fake("grouped_linear")
def _(rows: Tensor, start: Tensor | None, count: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[1]))


@fake("grouped_outer")
def _(left: Tensor, right: Tensor, start: Tensor | None, count: Tensor) -> Tensor:
    return left.new_empty((count.shape[0], left.shape[1], right.shape[1]))
