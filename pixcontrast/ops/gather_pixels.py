"""Some pixels of a feature map as rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..checks import check_features, check_int64, check_like, check_range
from . import fake, uses_extension
from .autograd import differentiable_once


def gather_pixels(features: Tensor, index: Tensor, backend: str = "auto") -> Tensor:
    """Some pixels as rows, ``rows_of(features)[index]``, without copying the others; see
    :func:`pixcontrast.reference.gather_pixels`.

    Args:
        features: ``[P, D]`` or ``[B, D, H, W]`` (contiguous or channels_last), float32, bfloat16, float16 or float64.
        index: ``[R]`` int64, the pixel of each row in ``[0, P)`` (``P = B * H * W``), -1 for none. A pixel may occur
            more than once. On CUDA every value outside ``[0, P)`` means none.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.

    Returns:
        ``[R, D]`` in the dtype of ``features``. A row without pixel is zero and passes no gradient. The gradient
        reaches ``features``; rows of one pixel are added up in their order.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or (on CPU) pixels that do not fit, named.
    """
    check_features(features)
    check_int64("index", index)
    if index.dim() != 1:
        raise ValueError(f"index must be [R], got {tuple(index.shape)}")
    check_like("index", index, tuple(index.shape), features.device)
    check_range("index", index, -1, features.numel() // features.shape[1] - 1)
    if uses_extension(backend, features.device, features.dtype):
        return GatherPixels.apply(features, index)
    return reference.gather_pixels(features, index)


class GatherPixels(torch.autograd.Function):
    """Some pixels as rows, see :func:`pixcontrast.reference.gather_pixels`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index, features)
        return torch.ops.pixcontrast.gather_pixels(features, index)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor, None]:
        return torch.ops.pixcontrast.scatter_pixels(grad, *saved), None


@fake("gather_pixels")
def _(features: Tensor, index: Tensor) -> Tensor:
    return features.new_empty((index.shape[0], features.shape[1]))


@fake("scatter_pixels")
def _(grad: Tensor, index: Tensor, features: Tensor) -> Tensor:
    channels_last = features.dim() == 4 and features.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(features, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
