"""Projection and prediction heads, and the attention weights of each class ("selectors").

All work on :class:`~pixcontrast.functional.Segments` at a fixed size: rows that are not valid stay in the batch, but
neither in the statistics of BatchNorm nor in any gradient. So nothing waits for the device, and one row or none is no
special case.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ops.class_order import Segments
from .ops.grouped_linear import grouped_linear
from .ops.norm_linear import Norm, norm_linear
from .ops.pixel_linear import pixel_linear


class MLPHead(nn.Module):
    """Linear - BatchNorm - ReLU - Linear on rows: the layout of both the projection and the prediction head.

    BatchNorm runs over the valid rows. With fewer than two in training it normalises with the running statistics and
    leaves them alone, where ``BatchNorm1d`` raises.

    Args:
        in_channels: width of the incoming rows.
        dim: width of the hidden layer and of the result.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.
    """

    def __init__(self, in_channels: int, dim: int = 256, backend: str = "auto") -> None:
        super().__init__()
        self.first = nn.Linear(in_channels, dim)
        self.norm = nn.BatchNorm1d(dim)
        self.last = nn.Linear(dim, dim)
        self.backend = backend

    def forward(self, features: Tensor, segments: Segments | None = None) -> Tensor:
        """``features [P, in_channels]``, or every pixel of ``[B, in_channels, h, w]``, to rows ``[P, dim]``.

        Args:
            segments: which rows are valid. With an order, the result stands in class order; rows that are not valid
                are last, and mean nothing. ``None``: all rows are valid.
        """
        bn = self.norm
        assert bn.running_mean is not None and bn.running_var is not None and bn.momentum is not None
        statistics = (bn.running_mean, bn.running_var, bn.num_batches_tracked)
        norm = Norm(bn.weight, bn.bias, *statistics, bn.training, bn.momentum, bn.eps)
        hidden = pixel_linear(in_autocast(features), in_autocast(self.first.weight), self.backend)
        if segments is None:
            order, total = None, torch.full((1,), len(hidden), dtype=torch.int64, device=hidden.device)
        else:
            order, total = segments.order, segments.total
        return norm_linear(
            hidden,
            self.first.bias,
            norm,
            self.last.weight,
            self.last.bias,
            order=order,
            count=total,
            backend=self.backend,
        )


class ClassSelectors(nn.Module):
    """One small network a class, giving each row of the class the logit of its attention weight.

    Linear(dim, dim) - BatchNorm - LeakyReLU(0.2) - Linear(dim, 1) for every class, all classes at once.

    Args:
        num_classes: C.
        dim: width of the rows.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, num_classes: int, dim: int = 256, eps: float = 1e-5, momentum: float = 0.1, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.eps, self.momentum, self.backend = eps, momentum, backend
        bound = dim**-0.5  # the default of nn.Linear
        self.weight1 = nn.Parameter(torch.empty(num_classes, dim, dim).uniform_(-bound, bound))
        self.bias1 = nn.Parameter(torch.empty(num_classes, dim).uniform_(-bound, bound))
        self.norm_weight = nn.Parameter(torch.ones(num_classes, dim))
        self.norm_bias = nn.Parameter(torch.zeros(num_classes, dim))
        self.weight2 = nn.Parameter(torch.empty(num_classes, dim).uniform_(-bound, bound))
        self.bias2 = nn.Parameter(torch.empty(num_classes).uniform_(-bound, bound))
        self.register_buffer("running_mean", torch.zeros(num_classes, dim))
        self.register_buffer("running_var", torch.ones(num_classes, dim))

    def forward(self, rows: Tensor, start: Tensor | None, count: Tensor) -> Tensor:
        """Weight logits ``[P]`` of ``rows [P, dim]`` in class order; 0 for rows of no class.

        Args:
            start: ``[C]`` int64, first row of each class; ``None``: classes lie ``P / C`` rows apart, as in a memory.
            count: ``[C]`` int64, rows of each class.
        """
        hidden = grouped_linear(in_autocast(rows), in_autocast(self.weight1), start, count, self.backend)
        statistics = (self.norm_weight, self.norm_bias, self.running_mean, self.running_var, None)
        norm = Norm(*statistics, self.training, self.momentum, self.eps)
        return norm_linear(
            hidden,
            self.bias1,
            norm,
            self.weight2[:, None],
            self.bias2,
            start=start,
            count=count,
            slope=0.2,
            backend=self.backend,
        )


def in_autocast(rows: Tensor) -> Tensor:
    """``rows`` in the dtype of autocast, if it is on; float64 as it is."""
    device = rows.device.type
    if rows.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return rows
    return rows.to(torch.get_autocast_dtype(device))
