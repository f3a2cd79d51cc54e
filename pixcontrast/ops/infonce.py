"""Pixel InfoNCE: the loss of Wang et al."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..checks import check_excluded, check_features, check_int64, check_key_count, check_like, check_queue
from ..select import Anchors
from . import fake, uses_extension
from .autograd import differentiable_once, keep_connected, scaled, unscaled_grad


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
        excluded: ``[R]`` int64, a key of the own class that is no positive (-1: none), counted over the queues one
            after the other. Beyond the keys of the class: an error on CPUs, without effect on CUDA.
        temperature: divides the similarities.
        base_temperature: the loss is multiplied by ``temperature / base_temperature``.
        loss_weight: factor of the loss.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.

    Returns:
        :class:`InfoNCEOutput`. The gradient reaches ``features`` alone. Anchors and keys that are not finite give NaN.

    Raises:
        ValueError, TypeError: arguments that do not fit, named.
    """
    check_features(features)
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
    if excluded is not None:
        check_excluded(excluded, anchors, queue_counts)
    constants = [queue.detach() for queue in queues]
    features = features if torch.is_grad_enabled() else features.detach()
    if uses_extension(backend, features.device, features.dtype):
        if not features.requires_grad:  # then torch.compile cannot trace the Function
            factors = temperature, base_temperature, loss_weight
            arguments = features, *anchors, constants, list(queue_counts), excluded, *factors
            return InfoNCEOutput(*torch.ops.pixcontrast.infonce(*arguments, False)[:3])
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
        keep_connected(ctx, features)
        ctx.dtype = features.dtype
        ctx.inputs = 7 + len(queues_and_counts)
        ctx.mark_non_differentiable(anchor_loss, positives)
        ctx.set_materialize_grads(False)  # allocates no zeros for outputs without gradient
        return loss, anchor_loss, positives

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (features,) = scaled(saved, ctx.needs, grad_loss, ctx.dtype)
        return features, *[None] * (ctx.inputs - 1)


@fake("infonce")
def _(
    features: Tensor,
    index: Tensor,
    labels: Tensor,
    queues: list[Tensor],
    counts: list[Tensor],
    excluded: Tensor | None,
    temperature: float,
    base_temperature: float,
    loss_weight: float,
    features_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = reference.accumulation_dtype(features.dtype)
    return (
        features.new_empty((), dtype=dtype),
        features.new_empty(index.shape, dtype=dtype),
        torch.empty_like(index),
        unscaled_grad(features) if features_grad else features.new_empty(0),
    )
