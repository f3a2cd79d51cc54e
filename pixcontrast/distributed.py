"""What the processes of a group exchange, so that class means run over the pixels or rows of all of them.

Every function here is a collective: each rank of the default process group must call it, equally often and in the same
order, also with nothing to add.

Gradients follow the convention of ``DistributedDataParallel`` and ``SyncBatchNorm``: each rank holds a loss, what is
minimised is their mean, and gradients of the parameters are averaged over the ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

from .functional import PositiveOutput, contrast_with_mean
from .reference import MIN_ROWS, accumulation_dtype


def world_size() -> int:
    """Processes in the default group; 1 if there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of ``value`` over all ranks, the same on each. The gradient is summed likewise."""
    from torch.distributed.nn.functional import all_reduce  # not there in builds of PyTorch without torch.distributed

    return all_reduce(value)


def rank_share(log_weight: Tensor, present: Tensor) -> Tensor:
    """Share ``[C]`` of this rank in ``sum_over_ranks(exp(log_weight))``; the shares of a class add up to one.

    Args:
        log_weight: ``[C]``, logarithm of what this rank has of each class, with gradient.
        present: ``[C]`` bool, whether it has anything; where no rank has, all shares are zero.
    """
    info = torch.finfo(log_weight.dtype)
    top = log_weight.detach().masked_fill(~present, info.min)
    dist.all_reduce(top, dist.ReduceOp.MAX)
    weight = torch.where(present, torch.where(present, log_weight - top, 0).exp(), 0)
    return weight / sum_over_ranks(weight).clamp_min(info.tiny)


def mean_over_ranks(mean: Tensor, counts: Tensor, weight_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Class means of a memory that is spread over the ranks, from the means of its parts: about ``4 C D`` bytes.

    Args:
        mean: ``[C, D]``, weighted mean unit row of each class on this rank, as of
            :func:`pixcontrast.functional.memory_mean`.
        counts: ``[C]`` int64, rows of each class on this rank, the first of ``N``.
        weight_logits: ``[C, N]`` logits that the mean was weighted by; ``None``: all alike.

    Returns:
        the weighted mean ``[C, D]`` over the rows of all ranks, whose gradient reaches ``mean`` and ``weight_logits``
        of each rank; and how many rows that are ``[C]`` int64.
    """
    if weight_logits is None:
        log_weight = counts.to(mean.dtype).log()
    else:
        filled = torch.arange(weight_logits.shape[1], device=counts.device) < counts[:, None]
        log_weight = _log_weight(weight_logits.to(mean.dtype), filled, dim=1)
    total = counts.clone()
    dist.all_reduce(total)
    return sum_over_ranks(rank_share(log_weight, counts > 0)[:, None] * mean), total


def contrast_over_ranks(
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
    """:func:`pixcontrast.functional.contrast_with_mean` of the pixels of all ranks together.

    With ``s_r`` the similarity of rank r's pixels of a class with the memory, and ``p_r`` the share of their weights in
    those of all ranks, ``L_c = 1 - sum_r p_r s_r``. The operator sees the pixels of its own rank alone, so where that
    has a single pixel of a class, this pixel takes no part.

    Args and errors: as there; ``mean`` and ``counts`` are the same on every rank.

    Returns:
        :class:`PositiveOutput` of the pixels of all ranks, the same on every rank. Averaged over the ranks, as
        ``DistributedDataParallel`` does, the gradients are those of one process with all pixels.
    """
    classes = mean.shape[0]
    dtype = accumulation_dtype(features.dtype)
    member = labels.reshape(-1, 1) == torch.arange(classes, device=labels.device)
    pixels = member.sum(0)
    present = pixels >= MIN_ROWS
    if weight_logits is None:
        log_weight = pixels.to(dtype).log()
    else:
        log_weight = _log_weight(weight_logits.reshape(-1, 1).to(dtype), member, dim=0)
    share = rank_share(log_weight, present)
    fixed = dist.get_world_size() * share.detach()
    part = contrast_with_mean(
        features,
        labels,
        mean.to(dtype) * fixed[:, None],
        counts,
        weight_logits=weight_logits,
        ignore_index=ignore_index,
        loss_weight=loss_weight,
        backend=backend,
    )
    total = torch.where(present, pixels, 0)
    dist.all_reduce(total)
    active = (total >= MIN_ROWS) & (counts >= MIN_ROWS)
    similarity = torch.where(present & active, 1 - part.class_loss, 0)  # world size times p_r s_r
    class_loss = similarity / dist.get_world_size()
    dist.all_reduce(class_loss)
    class_loss = torch.where(active, 1 - class_loss, 0)
    value = class_loss.sum() * (loss_weight / classes)
    # The operator treats the share as a constant. The second term has the gradient through it; the value is that of
    # all ranks.
    ratio = share / share.detach().clamp_min(torch.finfo(dtype).tiny)
    loss = part.loss - (ratio * similarity).sum() * (loss_weight / classes)
    return PositiveOutput(value + (loss - loss.detach()), class_loss, total)


def _log_weight(logits: Tensor, member: Tensor, dim: int) -> Tensor:
    """``log sum sigma(logits)`` along ``dim`` over the members."""
    log_sigma = logsigmoid(torch.where(member, logits, 0))
    return log_sigma.masked_fill(~member, torch.finfo(logits.dtype).min).logsumexp(dim)
