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
        ctx.mark_non_differentiable(class_loss, pixels, unknown)
        ctx.set_materialize_grads(False)  # no zeros for these
        return loss, class_loss, pixels, unknown

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        features, weight_logits, mean = _scaled(ctx.saved_tensors, ctx.needs, grad_loss)
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
        ctx.inputs = 7 + len(queues_and_counts)
        ctx.mark_non_differentiable(anchor_loss, positives)
        return loss, anchor_loss, positives

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (features,) = _scaled(ctx.saved_tensors, ctx.needs, grad_loss)
        return features, *[None] * (ctx.inputs - 1)


class GatherPixels(torch.autograd.Function):
    """Some pixels as rows, see :func:`pixcontrast.reference.gather_pixels`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index, features)
        return torch.ops.pixcontrast.gather_pixels(features, index)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.ops.pixcontrast.scatter_pixels(grad, *ctx.saved_tensors), None


def _scaled(grads: Iterable[Tensor], needed: Iterable[bool], grad_output: Tensor) -> list[Tensor | None]:
    """Gradients, which forward computed for ``grad_output = 1``, times ``grad_output``.

    In place, unless the graph is kept and they may be asked for again. A CPU reads ``grad_output`` and skips a factor
    of one; on CUDA one kernel scales all of them, because reading it would wait for the device.
    """
    wanted = [grad if need else None for need, grad in zip(needed, grads, strict=True)]
    written = [grad for grad in wanted if grad is not None]
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return [None if grad is None else grad * grad_output.to(grad.dtype) for grad in wanted]
    if grad_output.device.type != "cpu":
        torch.ops.pixcontrast.scale_(written, grad_output)
    elif grad_output.item() != 1:
        for grad in written:
            grad.mul_(grad_output.to(grad.dtype))
    return wanted
