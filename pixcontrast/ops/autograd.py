"""What the autograd Functions of the operators share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..checks import readable
from . import fake

Gradients = tuple[Tensor | None, ...]


def keep_connected(ctx: Any, *inputs: Tensor | None) -> None:
    """Saves empty tensors that depend on ``inputs``: where forward saves no inputs, :func:`differentiable_once` needs
    them."""
    if not torch.compiler.is_compiling():
        with torch.enable_grad():  # a clone, because a slice would keep the memory of its input
            ctx.connected = [x[:0].clone() for x in inputs if x is not None and x.requires_grad]


def differentiable_once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Makes a second differentiation an error. ``backward`` gets ``ctx``, ``ctx.saved_tensors`` and what comes in.

    PyTorch's ``once_differentiable`` does so only where ``grad_output`` needs a gradient, which that of a plain loss
    does not: a gradient penalty would silently get the gradient of its other terms. ``torch.autograd.grad`` runs only
    the nodes that lead to the inputs it is given, so the node of the error must lead to every input of forward.
    """

    @wraps(backward)
    def guarded(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        # once: activation checkpointing recomputes them at each reading
        saved = ctx.saved_tensors if torch.compiler.is_compiling() else _unchanged(ctx)
        with torch.no_grad():
            grads = backward(ctx, saved, *grad_outputs)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return grads
        message = (
            "pixcontrast: gradients of the contrast cannot be differentiated again (a gradient penalty, "
            'torch.autograd.functional.hessian, ...); use backend="reference"'
        )
        inputs = [None if grad is None else grad.detach().requires_grad_() for grad in grads]
        inputs += [x for x in (*saved, *getattr(ctx, "connected", ())) if x is not None and x.requires_grad]
        guarded_grads = torch._C._functions.DelayedError(message, len(inputs))(*inputs)  # type: ignore[arg-type]
        return tuple(guarded_grads)[: len(grads)]

    return guarded


def _unchanged(ctx: Any) -> tuple[Tensor | None, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "pixcontrast: the memory, or another input of the loss, was changed between the loss and backward(), which "
            "needs it; call push or remember before the loss or after backward()"
        ) from error


def scaled(
    grads: Iterable[Tensor], needed: Iterable[bool], grad_output: Tensor | None, dtype: torch.dtype
) -> list[Tensor | None]:
    """Gradients, which forward computed for ``grad_output = 1``, times ``grad_output``.

    The first is that of the features, which have this ``dtype``. Of float16 features it is stored in float32, because
    under loss scaling only the product is in the range of float16; then it is multiplied and rounded in one operation.

    In place, unless the graph is kept and they may be asked for again. A CPU reads ``grad_output`` and skips a factor
    of one; on CUDA one kernel scales all of them, because reading it would wait for the device.
    """
    if grad_output is None:  # the loss is not used
        return [None for _ in needed]
    wanted = [grad if need else None for need, grad in zip(needed, grads, strict=True)]
    batched = not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad_output)
    if torch.compiler.is_compiling() or batched:  # by is_grads_batched=True
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
        elif not readable(grad_output) or grad_output.item() != 1:
            for grad in written:
                grad.mul_(grad_output.to(grad.dtype))
    return [rounded if wanted[0] is None else wanted[0], *wanted[1:]]


def unscaled_grad(features: Tensor) -> Tensor:
    """For the gradient of ``features`` for ``grad_output = 1``: that of float16 is in float32, see :func:`scaled`."""
    return torch.empty_like(features, dtype=torch.float32 if features.dtype == torch.float16 else None)


@fake("scale_")
def _(tensors: list[Tensor], factor: Tensor) -> None:
    return None
