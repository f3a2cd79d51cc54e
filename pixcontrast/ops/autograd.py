"""What the autograd Functions of the operators share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from . import available

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


def scaled(grads: Iterable[Tensor], needed: Iterable[bool], grad_output: Tensor | None) -> list[Tensor | None]:
    """Gradients, which forward computed for ``grad_output = 1``, times ``grad_output``.

    In place, unless the graph is kept and they may be asked for again. A CPU reads ``grad_output`` and skips a factor
    of one; on CUDA one kernel scales all of them, because reading it would wait for the device.
    """
    if grad_output is None:  # the loss is not used
        return [None for _ in needed]
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


if available():

    @torch.library.register_fake("pixcontrast::scale_")
    def _(tensors: list[Tensor], factor: Tensor) -> None:
        return None
