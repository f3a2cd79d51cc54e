"""The operators as functions: arguments checked, one backend chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops, reference
from .checks import (
    check_excluded,
    check_float,
    check_int64,
    check_key_count,
    check_label_values,
    check_like,
    check_pixel_values,
    check_pixels_and_labels,
    check_queue,
)
from .functions import InfoNCE, MemoryMean, Positive, Project
from .select import Anchors

BACKENDS = ("auto", "extension", "reference")


class PositiveOutput(NamedTuple):
    """Result of :func:`positive_contrast`."""

    loss: Tensor
    """Scalar in the accumulation dtype (float32, or float64 for float64 features)."""
    class_loss: Tensor
    """``[C]``: one minus the weighted mean similarity of each class; 0 where a class takes no part. No gradient."""
    counts: Tensor
    """``[C]`` int64: valid rows of each class."""


def uses_extension(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``backend`` means the compiled kernels for tensors of ``dtype`` on ``device``.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: ``"extension"`` was asked for and there is no kernel.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "reference":
        return False
    missing = ops.missing_kernel(device, dtype)
    if backend == "extension" and missing:
        raise RuntimeError(f'backend="extension": {missing}; or use backend="auto", which then runs on plain PyTorch')
    return missing is None


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
    if not torch.is_grad_enabled():  # a Function is told of leaves that want a gradient all the same
        features, mean = features.detach(), mean.detach()
        weight_logits = None if weight_logits is None else weight_logits.detach()
    if uses_extension(backend, features.device, features.dtype):
        loss, class_loss, pixels, unknown = Positive.apply(
            features, labels, weight_logits, mean, counts, loss_weight, ignore_index
        )
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and unknown.item():
            check_label_values(labels, mean.shape[0], ignore_index, "labels")
        return PositiveOutput(loss, class_loss, pixels)
    check_label_values(labels, mean.shape[0], ignore_index, "labels")
    labels = torch.where(labels == ignore_index, -1, labels)
    return PositiveOutput(*reference.positive(features, labels, weight_logits, mean, counts, loss_weight))


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
    check_float("features", features)
    if features.dim() not in (2, 4):
        raise ValueError(f"features must be [P, D] or [B, D, H, W], got {tuple(features.shape)}")
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


def project(
    features: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Some pixels through a linear layer, ``torch.nn.functional.linear(rows_of(features)[index], weight, bias)``,
    without copying the pixels first; see :func:`pixcontrast.reference.project`.

    Args:
        features: ``[P, Din]`` or ``[B, Din, H, W]`` (contiguous or channels_last).
        index: ``[R]`` int64, the pixel of each row, -1 for none. A pixel may occur more than once. Fastest where row r
            means pixel r or none.
        weight: ``[Dout, Din]``, ``bias``: ``[Dout]`` or ``None``, cast to the dtype of ``features``.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.

    Returns:
        ``[R, Dout]`` in the dtype of ``features``, or, like every linear layer, in that of autocast. A row without
        pixel is zero and passes no gradient. Gradients reach ``features``, ``weight`` and ``bias``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or (on CPU) pixels that do not fit, named.
    """
    check_float("features", features)
    if features.dim() not in (2, 4):
        raise ValueError(f"features must be [P, Din] or [B, Din, H, W], got {tuple(features.shape)}")
    if index.dim() != 1:
        raise ValueError(f"index must be [R], got {tuple(index.shape)}")
    check_like("index", index, tuple(index.shape), features.device)
    check_int64("index", index)
    check_float("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [Dout, Din={features.shape[1]}], got {tuple(weight.shape)}")
    check_like("weight", weight, (weight.shape[0], features.shape[1]), features.device)
    if bias is not None:
        check_float("bias", bias)
        check_like("bias", bias, (weight.shape[0],), features.device)
    check_pixel_values(index, features.numel() // max(features.shape[1], 1))
    device = features.device.type
    if torch.is_autocast_enabled(device) and features.dtype != torch.float64:
        features = features.to(torch.get_autocast_dtype(device))
    weight, bias = weight.to(features.dtype), None if bias is None else bias.to(features.dtype)
    if uses_extension(backend, features.device, features.dtype):
        return Project.apply(features, index, weight, bias)
    return reference.project(features, index, weight, bias)
