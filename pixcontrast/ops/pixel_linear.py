"""A linear layer on every pixel of a feature map, without copying the map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


def pixel_linear(features: Tensor, weight: Tensor) -> Tensor:
    """``weight @ pixel`` for every pixel, or every row, of ``features``.

    Args:
        features: ``[P, D]`` or ``[B, D, H, W]`` (contiguous or channels_last). All of them are multiplied: NaN in a
            pixel makes the gradient of the weight NaN, even if the gradient of that pixel is zero.
        weight: ``[O, D]`` in the dtype of ``features``.

    Returns:
        ``[P, O]``, with P = B * H * W pixels in the order of ``[B, H, W]``. The gradient of the features is laid out
        like them.
    """
    if features.dtype == torch.float16 and features.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):  # which would multiply in float16 again, a hundred times slower
            return pixel_linear(features.float(), weight.float()).half()
    if features.dim() == 2:
        return linear(features, weight)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():  # no Function of ours there
        return linear(features.flatten(2).transpose(1, 2), weight).flatten(0, 1)
    if features.is_contiguous(memory_format=torch.channels_last):
        return linear(features.permute(0, 2, 3, 1).flatten(0, 2), weight)
    return PixelLinear.apply(features.flatten(2), weight).flatten(0, 1)


class PixelLinear(torch.autograd.Function):
    """``y [B, S, O] = x^T w^T`` for ``x [B, D, S]`` and ``w [O, D]``; ``dx = w^T dy^T``, ``dw = sum_b dy^T x^T``.

    ``torch.matmul`` would copy the map, to make one product of all images.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x.transpose(1, 2), weight.t().expand(len(x), -1, -1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        transposed = grad.transpose(1, 2)
        grad_x = torch.bmm(weight.t().expand(len(x), -1, -1), transposed) if ctx.needs_input_grad[0] else None
        grad_weight = torch.bmm(transposed, x.transpose(1, 2)).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight
