"""The operators of the extension as ``torch.autograd.Function``; called through :mod:`pixcontrast.functional`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class MemoryMean(torch.autograd.Function):
    """Weighted mean unit row of each class, see :func:`pixcontrast.reference.memory_mean`. The queue is a constant."""

    @staticmethod
    def forward(ctx: Any, queue: Tensor, counts: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(queue, counts, weights)
        return torch.ops.pixcontrast.memory_mean(queue, counts, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor) -> tuple[None, None, Tensor | None]:
        queue, counts, weights = ctx.saved_tensors
        if not ctx.needs_input_grad[2]:
            return None, None, None
        return None, None, torch.ops.pixcontrast.memory_mean_backward(grad_mean, queue, counts, weights)


class Positive(torch.autograd.Function):
    """Loss and its gradients in one pass over the features, see :func:`pixcontrast.reference.positive`.

    The forward writes the gradients for an incoming gradient of one. The backward hands them on, scaled only if the
    incoming gradient is another number.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        mean: Tensor,
        memory_counts: Tensor,
        loss_weight: float,
        ignore_index: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3])
        loss, class_loss, pixels, unknown, *grads = torch.ops.pixcontrast.positive(
            features, labels, weights, mean, memory_counts, loss_weight, ignore_index, *needs
        )
        ctx.save_for_backward(*grads)
        ctx.needs = needs
        ctx.mark_non_differentiable(class_loss, pixels, unknown)
        return loss, class_loss, pixels, unknown

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        unscaled = not torch.compiler.is_compiling() and grad_loss.device.type == "cpu" and grad_loss.item() == 1
        features, weights, mean = (
            None if not needed else grad if unscaled else grad * grad_loss.to(grad.dtype)
            for needed, grad in zip(ctx.needs, ctx.saved_tensors, strict=True)
        )
        return features, None, weights, mean, None, None, None
