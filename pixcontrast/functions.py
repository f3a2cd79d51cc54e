"""The operators of the extension as ``torch.autograd.Function``; called through :mod:`pixcontrast.functional`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def differentiable_once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Makes a second differentiation an error.

    PyTorch's ``once_differentiable`` does so only where ``grad_output`` needs a gradient, which that of a plain loss
    does not: a gradient penalty would silently get the gradient of its other terms.
    """

    @wraps(backward)
    def guarded(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        with torch.no_grad():
            grads = backward(ctx, *grad_outputs)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return grads
        message = (
            "pixcontrast: gradients of the contrast cannot be differentiated again (a gradient penalty, "
            'torch.autograd.functional.hessian, ...); use backend="reference"'
        )
        guard = torch._C._functions.DelayedError(message, len(grads))
        return guard(*[None if grad is None else grad.detach().requires_grad_() for grad in grads])  # type: ignore[arg-type]

    return guarded


class MemoryMean(torch.autograd.Function):
    """Weighted mean unit row of each class, see :func:`pixcontrast.reference.memory_mean`. The queue is a constant."""

    @staticmethod
    def forward(ctx: Any, queue: Tensor, counts: Tensor, weight_logits: Tensor | None) -> Tensor:
        ctx.save_for_backward(queue, counts, weight_logits)
        return torch.ops.pixcontrast.class_mean(queue, counts, weight_logits)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_mean: Tensor) -> tuple[None, None, Tensor | None]:
        queue, counts, weight_logits = ctx.saved_tensors
        if not ctx.needs_input_grad[2]:
            return None, None, None
        return None, None, torch.ops.pixcontrast.class_mean_backward(grad_mean, queue, counts, weight_logits)


class Positive(torch.autograd.Function):
    """Loss and all its gradients at once, see :func:`pixcontrast.reference.positive`.

    The forward writes the gradients for an incoming gradient of one: the features are read once. The backward hands
    them on, scaled only if the incoming gradient is another number.
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
        ctx.dtype = features.dtype
        ctx.mark_non_differentiable(class_loss, pixels, unknown)
        return loss, class_loss, pixels, unknown

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        features, weight_logits, mean = _scaled(ctx.saved_tensors, ctx.needs, grad_loss, ctx.dtype)
        return features, None, weight_logits, mean, None, None, None


class InfoNCE(torch.autograd.Function):
    """Loss and gradient of InfoNCE in one stream over the keys, see :func:`pixcontrast.reference.infonce`."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        index: Tensor,
        labels: Tensor,
        excluded: Tensor | None,
        temperature: float,
        base_temperature: float,
        loss_weight: float,
        *queues_and_counts: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        half = len(queues_and_counts) // 2
        queues, counts = list(queues_and_counts[:half]), list(queues_and_counts[half:])
        ctx.needs = (ctx.needs_input_grad[0],)
        loss, anchor_loss, positives, grad = torch.ops.pixcontrast.infonce(
            features, index, labels, queues, counts, excluded, temperature, base_temperature, loss_weight, *ctx.needs
        )
        ctx.save_for_backward(grad)
        ctx.dtype = features.dtype
        ctx.inputs = 7 + len(queues_and_counts)
        ctx.mark_non_differentiable(anchor_loss, positives)
        return loss, anchor_loss, positives

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (features,) = _scaled(ctx.saved_tensors, ctx.needs, grad_loss, ctx.dtype)
        return features, *[None] * (ctx.inputs - 1)


class Project(torch.autograd.Function):
    """Some pixels through a linear layer, see :func:`pixcontrast.reference.project`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(features, index, weight)
        return torch.ops.pixcontrast.project(features, index, weight, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
        grads = torch.ops.pixcontrast.project_backward(grad, *ctx.saved_tensors, *needs)
        features, weight, bias = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return features, None, weight, bias


class Head(torch.autograd.Function):
    """A head behind its first product: BatchNorm - ReLU - Linear(E, O).

    ``hidden [P, E]``; ``valid [P]`` bool: rows that take part, the others give zeros (``None``: all do); ``mean``,
    ``rstd``, ``norm_weight``, ``norm_bias`` ``[E]``, ``weight [O, E]``, ``bias [O]``. ``share []`` is what one row
    contributes to mean and variance, through which the gradient goes on too: one over the number of rows that take
    part, or 0 where mean and rstd are constants.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        valid: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        share: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(hidden, valid, mean, rstd, norm_weight, norm_bias, weight, share)
        return torch.ops.pixcontrast.head(hidden, valid, mean, rstd, norm_weight, norm_bias, weight, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *parameters = torch.ops.pixcontrast.head_backward(grad, *ctx.saved_tensors)
        return hidden, None, None, None, *parameters, None


class Selector(torch.autograd.Function):
    """Class selectors: for each class Linear(D, E) without bias - BatchNorm - LeakyReLU(0.2) - Linear(E, 1).

    ``rows [N, D]``; ``order [P]`` int64, rows sorted by class, and ``ends [C]`` int64 (those of class c are
    ``order[ends[c - 1] : ends[c]]``, the last one is P), see ``torch.ops.pixcontrast.sort_by_class``; ``first
    [C, E, D]``, and ``hidden [P, E]``, what ``torch.ops.pixcontrast.selector_hidden`` makes of them. All else is
    ``[C, E]``, but ``bias [C]`` and ``own [C]`` bool: classes whose ``mean`` and ``rstd`` come from their rows. There
    the gradient goes on through them to the rows; the ``mean`` of other classes has a gradient of its own.

    Gives logits ``[N]``, 0 for rows that are not in ``order``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        order: Tensor,
        ends: Tensor,
        first: Tensor,
        hidden: Tensor,
        mean: Tensor,
        rstd: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        own: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(rows, order, ends, first, hidden, mean, rstd, norm_weight, norm_bias, weight, own)
        return torch.ops.pixcontrast.selector(
            rows, order, ends, hidden, mean, rstd, norm_weight, norm_bias, weight, bias
        )

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes them at each reading
        *_, rstd, norm_weight, _, _, own = saved
        rows_grad = ctx.needs_input_grad[0]
        rows, first, *norm, weight, bias = torch.ops.pixcontrast.selector_backward(grad, *saved, rows_grad)
        mean = torch.where(own[:, None], 0, -rstd * norm_weight * norm[1])
        return rows if rows_grad else None, None, None, first, None, mean, None, *norm, weight, bias, None


def _scaled(
    grads: Iterable[Tensor], needed: Iterable[bool], grad_output: Tensor, dtype: torch.dtype
) -> list[Tensor | None]:
    """Gradients, which forward computed for ``grad_output = 1``, times ``grad_output``.

    The first is that of the features, which have this ``dtype``. Of float16 features it is stored in float32, because
    under loss scaling only the product is in the range of float16; then it is multiplied and rounded in one operation.

    In place, unless the graph is kept and they may be asked for again. A CPU reads ``grad_output`` and skips a factor
    of one; on CUDA one kernel scales all of them, because reading it would wait for the device.
    """
    wanted = [grad if need else None for need, grad in zip(needed, grads, strict=True)]
    if torch.compiler.is_compiling():
        scaled = [None if grad is None else grad * grad_output.to(grad.dtype) for grad in wanted]
        return [None if scaled[0] is None else scaled[0].to(dtype), *scaled[1:]]
    rounded = wanted[0]
    if rounded is not None and rounded.dtype != dtype:
        rounded = torch.mul(rounded, grad_output, out=torch.empty_like(rounded, dtype=dtype))
        wanted[0] = None
    if torch._C._autograd._get_current_graph_task_keep_graph():
        wanted = [None if grad is None else grad * grad_output.to(grad.dtype) for grad in wanted]
    else:
        written = [grad for grad in wanted if grad is not None]
        if not written:
            return [rounded, *wanted[1:]]
        if grad_output.device.type != "cpu":
            torch.ops.pixcontrast.scale_(written, grad_output)
        elif grad_output.item() != 1:
            for grad in written:
                grad.mul_(grad_output.to(grad.dtype))
    return [rounded if wanted[0] is None else wanted[0], *wanted[1:]]
