"""The second half of a head: BatchNorm over the rows of each segment, (leaky) ReLU and a linear layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import fake, uses_extension
from .autograd import differentiable_once


class Norm(NamedTuple):
    """BatchNorm of C segments with E channels: parameters and statistics ``[C, E]``, or ``[E]`` for one segment."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    """Moved by every call in training, for segments of two rows or more."""
    running_var: Tensor
    batches: Tensor | None
    """``[]`` int64: counts the calls that moved the statistics of the first segment."""
    training: bool
    """Statistics of the rows, for segments of two rows or more; else the running ones."""
    momentum: float = 0.1
    eps: float = 1e-5


def norm_linear(
    hidden: Tensor,
    hidden_bias: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor,
    *,
    order: Tensor | None = None,
    start: Tensor | None = None,
    count: Tensor,
    slope: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """BatchNorm - leaky ReLU - Linear on rows in segments.

    Args:
        hidden: ``[P, E]``, the result of a first layer without its bias.
        hidden_bias: bias of the first layer, shaped like ``norm.weight``. The statistics of the rows cancel it, so it
            enters only where the running ones normalise.
        norm: BatchNorm of each segment.
        weight: ``[O, E]`` for one dense layer behind all segments, with ``bias [O]``; or, for one output a segment,
            ``[C, 1, E]`` with ``bias [C]``.
        order: ``[P]`` int64, a permutation: row i of the segments is hidden row ``order[i]``. ``None``: row i.
        start: ``[C]`` int64, first row of each segment; ``None``: segments lie ``P / C`` rows apart.
        count: ``[C]`` int64, rows of each segment.
        slope: of the ReLU below zero.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.

    Returns:
        ``[P, O]`` in the dtype of ``hidden``; or, for one output a segment, ``[P]`` in the dtype of sums. Rows outside
        of all segments are ``bias``, or 0 for one output a segment; they pass no gradient to ``hidden``.
    """
    dense = weight.dim() == 2
    precise = reference.accumulation_dtype(hidden.dtype)
    parameters = [parameter.to(precise) for parameter in (hidden_bias, norm.weight, norm.bias)]
    layer = hidden.dtype if dense else precise
    weight, bias = (weight if dense else weight.squeeze(1)).to(layer), bias.to(layer)
    kept = [norm.running_mean, norm.running_var]
    running = [statistic.to(precise) for statistic in kept]
    rows = (order, start, count)
    if uses_extension(backend, hidden.device, hidden.dtype):
        with torch.no_grad():
            statistics = torch.ops.pixcontrast.norm_stats(
                hidden, *rows, parameters[0], *running, norm.batches, norm.training, norm.momentum, norm.eps
            )
        out = NormLinear.apply(hidden, *parameters, weight, bias, *rows, *statistics, slope, dense)
    else:
        norm = norm._replace(weight=parameters[1], bias=parameters[2], running_mean=running[0], running_var=running[1])
        out = reference.norm_linear(hidden, parameters[0], norm, weight, bias, rows, slope, dense)
    for old, moved in zip(kept, running, strict=True):
        if moved is not old:  # a module in half precision
            old.copy_(moved)
    return out


class NormLinear(torch.autograd.Function):
    """See :func:`norm_linear`, with ``mean``, ``rstd`` ``[C, E]`` and ``share [C]`` of ``norm_stats``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        hidden_bias: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        order: Tensor | None,
        start: Tensor | None,
        count: Tensor,
        mean: Tensor,
        rstd: Tensor,
        share: Tensor,
        slope: float,
        dense: bool,
    ) -> Tensor:
        ctx.save_for_backward(hidden, order, start, count, mean, rstd, share, norm_weight, norm_bias, weight)
        ctx.slope, ctx.dense = slope, dense
        forward = torch.ops.pixcontrast.norm_linear if dense else torch.ops.pixcontrast.norm_dot
        rows = (hidden, order, start, count, mean, rstd)
        return forward(*rows, norm_weight, norm_bias, slope, weight, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        *rows, weight = saved
        backward = torch.ops.pixcontrast.norm_linear_backward if ctx.dense else torch.ops.pixcontrast.norm_dot_backward
        hidden, norm_weight, norm_bias, hidden_bias, weight, bias = backward(grad, *rows, ctx.slope, weight)
        return hidden, hidden_bias, norm_weight, norm_bias, weight, bias, *[None] * 8


@fake("norm_stats")
def _(
    hidden: Tensor,
    order: Tensor | None,
    start: Tensor | None,
    count: Tensor,
    hidden_bias: Tensor,
    running_mean: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = running_mean.new_empty((count.shape[0], hidden.shape[1]))
    return mean, torch.empty_like(mean), running_mean.new_empty(count.shape)


@fake("norm_linear")
def _(hidden: Tensor, *arguments: Any) -> Tensor:
    weight, _bias = arguments[-2:]
    return hidden.new_empty((hidden.shape[0], weight.shape[0]))


@fake("norm_dot")
def _(hidden: Tensor, *arguments: Any) -> Tensor:
    return arguments[-1].new_empty(hidden.shape[:1])


def _gradients(grad_out: Tensor, hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    count, norm_weight, weight = arguments[2], arguments[6], arguments[9]
    dense = grad_out.dim() == 2
    bias = weight.new_empty(weight.shape[:1] if dense else count.shape)
    of_norm = [norm_weight.new_empty(norm_weight.shape) for _ in range(3)]
    return hidden.new_empty(hidden.shape), *of_norm, weight.new_empty(weight.shape), bias


fake("norm_linear_backward")(_gradients)
fake("norm_dot_backward")(_gradients)
