"""The two operators behind :meth:`pixcontrast.ClassMemory.push`: choose the best rows, write them into the rings."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import fake, uses_extension
from .class_order import Segments


def segment_topk(
    scores: Tensor | None,
    order: Tensor | None,
    start: Tensor,
    count: Tensor,
    k: int,
    *,
    rejected: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The ``k`` rows of the highest score of each segment; see :func:`pixcontrast.reference.segment_topk`.

    Args:
        scores: ``[P]`` floating point; ``None``: all alike.
        order: ``[L]`` int64, the row at each position, -1 for none; ``None``: the position itself.
        start, count: ``[S]`` int64; segment s is the positions from ``start[s]`` to ``start[s] + count[s] - 1``, and
            segments ascend without overlap.
        k: any number; far beyond 1024 it is slow on CUDA, where its square counts.
        rejected: ``[]`` int64, increased by the number of rows in segments whose score is not finite.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.

    Returns:
        ``[S, k]`` int64 rows, best first, of equal scores the lower row first; -1 where a segment has fewer rows with a
        finite score.
    """
    if scores is not None:
        scores = scores.detach().to(reference.accumulation_dtype(scores.dtype))
    if uses_extension(backend, start.device, torch.float32 if scores is None else scores.dtype):
        return torch.ops.pixcontrast.segment_topk(scores, order, start, count, k, rejected)
    index, not_finite = reference.segment_topk(scores, order, start, count, k)
    if rejected is not None:
        rejected.add_(not_finite)
    return index


def memory_write(
    rows: Tensor,
    counts: Tensor,
    cursors: Tensor,
    rejected: Tensor,
    source: Tensor,
    index: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Unit rows of ``source`` into the ring of each class; see :func:`pixcontrast.reference.memory_write`.

    Args:
        rows, counts, cursors: ``[C, N, D]``, ``[C]`` and ``[C]`` of the memory, written in place.
        rejected: ``[]`` int64, increased by the number of entries that are not stored because of their norm.
        source: ``[Q, D]`` or ``[B, D, H, W]``, in any dtype.
        index: ``[C, K]`` int64, rows or pixels of the source for each class, best first; outside ``[0, Q)``: none.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.
    """
    source = source.detach()
    if all([uses_extension(backend, rows.device, dtype) for dtype in (rows.dtype, source.dtype)]):
        torch.ops.pixcontrast.memory_write(rows, counts, cursors, rejected, source, index)
        if not torch.compiler.is_compiling() and not rows.is_inference():  # backward of an earlier loss must notice
            torch.autograd.graph.increment_version((rows, counts, cursors, rejected))
    else:
        reference.memory_write(rows, counts, cursors, rejected, source, index)


def best_rows(
    scores: Tensor | None,
    segments: Segments,
    quota: int | None,
    num_images: int,
    width: int,
    rejected: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The best ``quota`` rows of each class and image, and the best ``width`` of each class among them.

    Args:
        scores, rejected, backend: as for :func:`segment_topk`.
        segments: of classes and images: segment ``c * num_images + b`` is class c of image b.
        quota: rows of each segment; ``None`` for no limit but ``width``.
        num_images: how many images there are.
        width: rows of each class.

    Returns:
        ``[C, width]`` int64 rows, best first; -1 where there are fewer.
    """
    each = width if quota is None else min(quota, width)
    index = segment_topk(
        scores, segments.order, segments.start, segments.count, each, rejected=rejected, backend=backend
    )
    classes, size = len(index) // num_images, num_images * each
    if num_images == 1 or size == 0:
        return index[:classes]
    start = torch.arange(0, classes * size, size, device=index.device)
    return segment_topk(scores, index.reshape(-1), start, torch.full_like(start, size), width, backend=backend)


@fake("segment_topk")
def _(
    scores: Tensor | None, order: Tensor | None, start: Tensor, count: Tensor, k: int, rejected: Tensor | None
) -> Tensor:
    return start.new_empty((start.shape[0], k))


@fake("memory_write")
def _(rows: Tensor, counts: Tensor, cursors: Tensor, rejected: Tensor, source: Tensor, index: Tensor) -> None:
    return None
