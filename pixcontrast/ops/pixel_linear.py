"""A linear layer on every pixel of a feature map, without copying the map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import fake, uses_extension
from .autograd import differentiable_once


def pixel_linear(features: Tensor, weight: Tensor, backend: str = "auto") -> Tensor:
    """``weight @ pixel`` for every pixel, or every row, of ``features``.

    Args:
        features: ``[P, D]`` or ``[B, D, H, W]`` (contiguous or channels_last). All of them are multiplied: NaN in a
            pixel makes the gradient of the weight NaN, even if the gradient of that pixel is zero.
        weight: ``[O, D]`` in the dtype of ``features``.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.

    Returns:
        ``[P, O]``, with P = B * H * W pixels in the order of ``[B, H, W]``. The gradient of the features is laid out
        like them.
    """
    maps = features.dim() == 4
    if not uses_extension(backend, features.device, features.dtype):
        return linear(features.flatten(2).transpose(1, 2) if maps else features, weight).flatten(0, -2)
    if maps and not features.is_contiguous(memory_format=torch.channels_last):
        return PixelLinear.apply(features.flatten(2), weight).flatten(0, 1)
    return PixelLinear.apply(features.permute(0, 2, 3, 1).flatten(0, 2) if maps else features, weight)


class PixelLinear(torch.autograd.Function):
    """``y [P, O] = x w^T`` for rows ``x [P, D]`` and ``w [O, D]``; ``dx = dy w``, ``dw = dy^T x``.

    Or for maps: ``y [B, S, O] = x^T w^T`` for ``x [B, D, S]``; ``dx = w^T dy^T``, ``dw = sum_b dy^T x^T``.
    ``torch.matmul`` would copy them, to make one product of all images.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight.t()) if x.dim() == 2 else _product(x.transpose(1, 2), _each(weight.t(), x))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = saved
        transposed = grad.transpose(-2, -1)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad, weight) if x.dim() == 2 else _product(_each(weight.t(), x), transposed)
        if ctx.needs_input_grad[1]:
            grad_weight = _product(transposed, x) if x.dim() == 2 else _product(transposed, x.transpose(1, 2)).sum(0)
        return grad_x, grad_weight


def _each(matrix: Tensor, x: Tensor) -> Tensor:
    return matrix.expand(len(x), -1, -1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of matrices or of batches of them; on CPUs it takes memory that is kept from step to step."""
    if a.device.type == "cpu":
        return torch.ops.pixcontrast.matmul(a, b)
    return torch.bmm(a, b) if a.dim() == 3 else torch.mm(a, b)


@fake("matmul")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]))
