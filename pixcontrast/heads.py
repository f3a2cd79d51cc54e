"""Projection and prediction heads, and the attention weights of each class ("selectors").

All take rows with labels and work at a fixed size: rows that do not take part stay in the batch, but neither in the
statistics of BatchNorm nor in any gradient. So nothing waits for the device, and one row or none is no special case.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, leaky_relu, relu

from . import ops
from .functional import project
from .functions import Head, Selector


class MaskedBatchNorm1d(nn.BatchNorm1d):
    """``BatchNorm1d`` over the valid rows of a batch.

    With fewer than two valid rows in training it normalises with the running statistics and leaves them alone, where
    ``BatchNorm1d`` raises.
    """

    running_mean: Tensor  # never None here, unlike in the base class
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, input: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normalise ``input [P, D]``; ``valid [P]`` bool says which rows count (``None``: all)."""
        if not self.training:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):  # statistics of half-precision rows are float32
            return self._normalise(precise(input), valid).to(input.dtype)

    def _normalise(self, input: Tensor, valid: Tensor | None) -> Tensor:
        mask = torch.ones_like(input[:, 0]) if valid is None else valid.to(input.dtype)
        count = mask.sum()
        share = mask / count.clamp_min(1)
        mean = share @ input
        centred = input - mean
        variance = share @ centred.square()
        with torch.no_grad():
            self.update(mean, variance, count)
        enough = count >= 2
        scale = torch.rsqrt(torch.where(enough, variance, self.running_var) + self.eps) * self.weight
        shift = torch.where(enough, 0, mean - self.running_mean)
        return (centred + shift) * scale + self.bias

    def update(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics towards those of a batch, unless it had fewer than two rows."""
        rate = torch.zeros_like(mean[:1]).masked_fill(count >= 2, self.momentum or 0.0)
        self.running_mean.add_(rate * (mean - self.running_mean))
        unbiased = variance * count / (count - 1).clamp_min(1)
        self.running_var.add_(rate * (unbiased - self.running_var))
        self.num_batches_tracked.add_((count >= 2).long())


class MLPHead(nn.Module):
    """Linear - BatchNorm - ReLU - Linear on rows: the layout of both the projection and the prediction head.

    Args:
        in_channels: width of the incoming rows.
        dim: width of the hidden layer and of the result.
    """

    def __init__(self, in_channels: int, dim: int = 256) -> None:
        super().__init__()
        self.first = nn.Linear(in_channels, dim)
        self.norm = MaskedBatchNorm1d(dim)
        self.last = nn.Linear(dim, dim)

    def forward(self, rows: Tensor, valid: Tensor | None = None) -> Tensor:
        """``rows [P, in_channels]`` to ``[P, dim]``; ``valid [P]`` bool: rows that count in the statistics.

        Rows that do not count must be finite (the result for them means nothing).
        """
        if rows.device.type == "cpu" and self._fuses(rows):  # the kernels' own product leaves out what takes no part
            places = torch.arange(rows.shape[0])
            return self.at(rows, places if valid is None else torch.where(valid, places, -1))
        return self._behind(self.first(rows), valid)

    def at(self, features: Tensor, index: Tensor) -> Tensor:
        """Pixels ``index [R]`` (-1: none) of ``features [B, in_channels, h, w]`` to ``[R, dim]``.

        Only these pixels are read, and only they count in the statistics. Rows of index -1 mean nothing.
        """
        return self._behind(project(features, index, self.first.weight, self.first.bias), index >= 0)

    @staticmethod
    def _fuses(rows: Tensor) -> bool:
        """Whether there are kernels for what follows the first product."""
        return ops.missing_kernel(rows.device, rows.dtype) is None

    def _behind(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """BatchNorm, ReLU and the second product, where there are kernels by those, which keep nothing in between."""
        norm = self.norm
        if not self._fuses(hidden):
            return self.last(relu(norm(hidden, valid)))
        mean, variance = precise(norm.running_mean), precise(norm.running_var)
        share = torch.zeros_like(mean[0])
        if self.training:
            row_mean, row_variance, count = torch.ops.pixcontrast.head_moments(hidden.detach(), valid)
            with torch.no_grad():
                norm.update(row_mean, row_variance, count)
            own = count >= 2
            mean, variance = torch.where(own, row_mean, mean), torch.where(own, row_variance, variance)
            share = own.to(mean.dtype) / count.clamp_min(1)
        rstd = torch.rsqrt(variance + norm.eps)
        parameters = (precise(norm.weight), precise(norm.bias), self.last.weight, precise(self.last.bias))
        return Head.apply(hidden, valid, mean, rstd, *parameters, share)


class ClassSelectors(nn.Module):
    """One small network a class, giving each row of the class the logit of its attention weight.

    Linear(dim, dim) - BatchNorm - LeakyReLU(0.2) - Linear(dim, 1) for every class, all classes at once: rows are sorted
    by class and go through one grouped matrix product.

    Args:
        num_classes: C.
        dim: width of the rows.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_classes: int, dim: int = 256, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        bound = dim**-0.5  # the default of nn.Linear
        self.weight1 = nn.Parameter(torch.empty(num_classes, dim, dim).uniform_(-bound, bound))
        self.bias1 = nn.Parameter(torch.empty(num_classes, dim).uniform_(-bound, bound))
        self.norm_weight = nn.Parameter(torch.ones(num_classes, dim))
        self.norm_bias = nn.Parameter(torch.zeros(num_classes, dim))
        self.weight2 = nn.Parameter(torch.empty(num_classes, dim).uniform_(-bound, bound))
        self.bias2 = nn.Parameter(torch.empty(num_classes).uniform_(-bound, bound))
        self.register_buffer("running_mean", torch.zeros(num_classes, dim))
        self.register_buffer("running_var", torch.ones(num_classes, dim))

    def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Weight logits ``[P]`` of ``rows [P, dim]`` with ``labels [P]`` int64; 0 for labels outside ``[0, C)``."""
        classes, total = self.bias2.shape[0], rows.shape[0]
        if total == 0:
            return rows.new_zeros(0)
        if can_look(rows) and ops.missing_kernel(rows.device, rows.dtype) is None:
            return self._by_kernels(rows, labels)
        valid = (labels >= 0) & (labels < classes)
        ordered, order = torch.sort(torch.where(valid, labels, classes), stable=True)
        ends = torch.searchsorted(ordered, torch.arange(1, classes + 1, device=rows.device))
        sorted_rows = torch.where(ordered[:, None] < classes, rows[order], 0)
        logits = self._all_at_once(sorted_rows, ends, ordered)
        return logits.new_zeros(total).scatter(0, order, logits)

    def _all_at_once(self, rows: Tensor, ends: Tensor, labels: Tensor) -> Tensor:
        """Logits of rows sorted by class, with shapes that do not depend on the labels."""
        # rows of no class sit at the end, as zeros, in the last group
        ends = torch.cat([ends[:-1], torch.full_like(ends[:1], rows.shape[0])])
        # [P, C] one-hot: sums over classes, and what each row gets of its class, are matrix products; deterministic
        member = labels[:, None] == torch.arange(len(self.bias2), device=rows.device)
        hidden = self._first(in_autocast(rows), ends)
        with torch.autocast(rows.device.type, enabled=False):
            hidden = self._normalise(precise(hidden), member).to(hidden.dtype)
        logits = leaky_relu(hidden, 0.2) @ self.weight2.t() + self.bias2
        return torch.where(member, logits, 0).sum(1)

    def _by_kernels(self, rows: Tensor, labels: Tensor) -> Tensor:
        """The logits of all rows, by kernels that keep rows in the cache from one step to the next."""
        order, ends = torch.ops.pixcontrast.sort_by_class(labels, len(self.bias2))
        order = order[: int(ends[-1])]
        hidden, row_mean, row_variance = torch.ops.pixcontrast.selector_hidden(
            rows.detach(), order, ends, self.weight1.detach(), product_dtype(rows)
        )
        own = torch.zeros_like(ends, dtype=torch.bool)  # classes normalised by the statistics of their rows
        mean, variance = precise(self.running_mean - self.bias1), precise(self.running_var)
        if self.training:
            count = ends.diff(prepend=ends.new_zeros(1))
            own = count >= 2
            mean = torch.where(own[:, None], row_mean, mean)
            variance = torch.where(own[:, None], row_variance, variance)
            self._track(row_mean, row_variance, count[:, None])
        rstd = torch.rsqrt(variance + self.eps)
        parameters = map(precise, (self.norm_weight, self.norm_bias, self.weight2, self.bias2))
        return Selector.apply(rows, order, ends, self.weight1, hidden, mean, rstd, *parameters, own)

    def _first(self, rows: Tensor, ends: Tensor) -> Tensor:
        """The first product of rows sorted by class, without ``bias1``."""
        return grouped_linear(rows, in_autocast(self.weight1), ends.to(torch.int32))

    def _normalise(self, hidden: Tensor, member: Tensor) -> Tensor:
        """BatchNorm of each class over its own rows; a class with one row uses its running statistics.

        ``bias1`` cancels in the batch statistics, so it enters only where the running ones are used.
        """
        member = member.to(hidden.dtype)
        running_shift = self.bias1 - self.running_mean
        if not self.training:
            scale = torch.rsqrt(self.running_var + self.eps) * self.norm_weight
            return self._affine(hidden, member, scale, running_shift * scale + self.norm_bias)
        count = member.sum(0)[:, None]
        mean = member.t() @ hidden / count.clamp_min(1)
        centred = hidden - member @ mean
        variance = member.t() @ centred.square() / count.clamp_min(1)
        enough = count >= 2
        shift = torch.where(enough, 0, mean + running_shift)
        scale = torch.rsqrt(torch.where(enough, variance, self.running_var.clone()) + self.eps) * self.norm_weight
        self._track(mean, variance, count)
        return self._affine(centred, member, scale, shift * scale + self.norm_bias)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics towards those of classes with two rows or more; ``mean`` is without ``bias1``."""
        rate = torch.zeros_like(mean[:, :1]).masked_fill(count >= 2, self.momentum)
        unbiased = variance * count / (count - 1).clamp_min(1)
        self.running_mean.add_(rate * (mean + self.bias1 - self.running_mean))
        self.running_var.add_(rate * (unbiased - self.running_var))

    @staticmethod
    def _affine(rows: Tensor, member: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """``rows [P, E]`` times the scale ``[C, E]`` of their class, plus its shift."""
        return rows * (member @ scale) + member @ shift


def can_look(tensor: Tensor) -> bool:
    """Whether numbers of ``tensor`` can be looked at for nothing: it need not be waited for, and no graph is made."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def product_dtype(rows: Tensor) -> torch.dtype:
    """The dtype in which rows are multiplied: that of autocast; float64, or without autocast, their own."""
    device = rows.device.type
    if rows.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return rows.dtype
    return torch.get_autocast_dtype(device)


def in_autocast(rows: Tensor) -> Tensor:
    """``rows`` in their :func:`product_dtype`."""
    return rows.to(product_dtype(rows))


def precise(rows: Tensor) -> Tensor:
    """``rows`` in the dtype that statistics are taken in: float64 as it is, everything else as float32."""
    return rows if rows.dtype == torch.float64 else rows.float()


# An operator of its own, because in torch 2.11 the fake implementation of grouped_mm refuses float32, which keeps
# torch.compile out, although its kernels take it.
@torch.library.custom_op("pixcontrast::grouped_linear", mutates_args=())
def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``rows[i] @ weight[c].T`` for rows sorted by class.

    Args:
        rows: ``[P, D]``, the rows of class c at ``ends[c - 1] : ends[c]``.
        weight: ``[C, E, D]``, in the dtype of ``rows``.
        ends: ``[C]`` int32; the last one is P.

    Returns:
        ``[P, E]``.
    """
    if _uses_grouped_mm(rows, weight):
        return grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    if _has_own_kernel(rows):
        return torch.ops.pixcontrast.grouped_linear_cuda(rows, weight, ends)
    # one product a class, which on CUDA synchronises
    parts = rows.tensor_split(ends[:-1].tolist())
    return torch.cat([part @ matrix.t() for part, matrix in zip(parts, weight, strict=True)])


@torch.library.custom_op("pixcontrast::grouped_outer", mutates_args=())
def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """``sum_i left[i] right[i].T`` of each class, for rows sorted by class: ``[P, E]``, ``[P, D]`` to ``[C, E, D]``."""
    if _uses_grouped_mm(left, right):
        return grouped_mm(left.t(), right, offs=ends)
    if _has_own_kernel(left):
        return torch.ops.pixcontrast.grouped_outer_cuda(left, right, ends)
    splits = ends[:-1].tolist()
    pairs = zip(left.tensor_split(splits), right.tensor_split(splits), strict=True)
    return torch.stack([one.t() @ other for one, other in pairs])


def _has_own_kernel(matrix: Tensor) -> bool:
    """Whether the extension has a grouped product for ``matrix``: on CUDA only, for every width, asynchronous."""
    return matrix.device.type == "cuda" and ops.missing_kernel(matrix.device, matrix.dtype) is None


def _uses_grouped_mm(*matrices: Tensor) -> bool:
    """Whether PyTorch's ``grouped_mm`` computes the product.

    It has no float64 and takes only rows of a multiple of 16 bytes. On CUDA it is asynchronous for bfloat16 on compute
    capability 9.x and 10.x alone, and on 10.x it has returned gradients for classes without rows (pytorch#172439).
    """
    if any(m.dtype == torch.float64 or m.shape[-1] * m.element_size() % 16 for m in matrices):
        return False
    first = matrices[0]
    if not _has_own_kernel(first):
        return True
    return first.dtype == torch.bfloat16 and torch.cuda.get_device_capability(first.device)[0] == 9


@grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@grouped_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    d_rows = grouped_linear(grad, weight.transpose(1, 2).contiguous(), ends) if ctx.needs_input_grad[0] else None
    d_weight = grouped_outer(grad, rows, ends) if ctx.needs_input_grad[1] else None
    return d_rows, d_weight, None


grouped_linear.register_autograd(_grouped_linear_backward, setup_context=_keep_inputs)
