"""InfoNCE against a memory that is spread over the ranks: anchors travel, memory rows stay."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ops.autograd import differentiable_once, keep_connected, scaled
from .ops.infonce import InfoNCEOutput
from .reference import accumulation_dtype, as_rows
from .select import Anchors


def infonce_over_ranks(
    features: Tensor,
    anchors: Anchors,
    rows: Tensor,
    counts: Tensor,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
    loss_weight: float = 1.0,
) -> InfoNCEOutput:
    """:func:`pixcontrast.functional.infonce_contrast` of this rank's anchors with the memory rows of all ranks.

    A collective: every rank must call it, with the same number of anchors R (some may be -1). Each rank streams its
    own rows, class by class, past the anchors of all ranks; per-anchor maxima, sums and gradients are reduced. A rank
    sends ``W R (2 D + 5) + R (D + 1)`` elements for W ranks, however large the memory is. Products are PyTorch's.

    Args:
        features, anchors, temperature, base_temperature, loss_weight: as there; the features of this rank.
        rows: ``[C, N, D]``, this rank's rows.
        counts: ``[C]`` int64, how many of them are valid.

    Returns:
        :class:`~pixcontrast.functional.InfoNCEOutput` of this rank's anchors.
    """
    dtype = accumulation_dtype(features.dtype)
    labels = torch.where((anchors.indices >= 0) & (anchors.labels < len(counts)), anchors.labels, -1)
    if features.numel() == 0:  # this rank has no anchor, but rows for those of the others
        own = features.sum().to(dtype) + features.new_zeros(len(labels), features.shape[1], dtype=dtype)
        labels = torch.full_like(labels, -1)
    else:
        own = as_rows(features)[anchors.indices.clamp_min(0)].to(dtype)
    own = torch.where(labels[:, None] >= 0, own, 0)
    factor = loss_weight * temperature / base_temperature
    return InfoNCEOutput(*ShardedInfoNCE.apply(own, labels, rows.detach(), counts, temperature, factor))


class ShardedInfoNCE(torch.autograd.Function):
    """Forward has the gradient too: ``da_i = factor / (R P_i T) (r_i O_i - G_i)``, see :func:`_stream`."""

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, labels: Tensor, rows: Tensor, counts: Tensor, temperature: float, factor: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        away, toward, loss, pull, positives = _stream(own.detach(), labels, rows, counts, temperature)
        share = 1 / positives.clamp_min(1)
        anchor_loss = loss * share
        taking_part = (positives > 0).sum().clamp_min(1).to(own.dtype)
        grad = (pull[:, None] * away - toward) * (share * factor / (temperature * taking_part))[:, None]
        ctx.save_for_backward(grad)
        keep_connected(ctx, own)
        positives = positives.to(torch.int64)
        ctx.mark_non_differentiable(anchor_loss, positives)
        ctx.set_materialize_grads(False)
        return anchor_loss.sum() * (factor / taking_part), anchor_loss, positives

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (own,) = scaled(saved, (True,), grad_loss, saved[0].dtype)
        return own, *[None] * 5


def _stream(
    own: Tensor, labels: Tensor, rows: Tensor, counts: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums over the rows of all ranks, of this rank's anchors.

    With ``z_ij = a_i k_j / T``, over negatives ``M = max z``, ``n = sum e^(z-M)``, ``L = M + log n``, and over
    positives ``l_ij = logaddexp(z_ij, L_i)``.

    Returns:
        ``O = sum_neg e^(z-M) k``, ``G = sum_pos e^(L-l) k``, ``sum_pos (l - z)``, ``r = sum_pos e^(M-l)``, and the
        number of positives.
    """
    world, dtype = dist.get_world_size(), own.dtype
    anchors, classes = own.new_empty(world * len(own), own.shape[1]), labels.new_empty(world * len(labels))
    dist.all_gather(list(anchors.chunk(world)), own.contiguous())
    dist.all_gather(list(classes.chunk(world)), labels)
    valid = torch.arange(rows.shape[1], device=rows.device) < counts[:, None]
    lowest = torch.finfo(dtype).min / 4
    top, total, away = own.new_full((len(anchors),), lowest), own.new_zeros(len(anchors)), torch.zeros_like(anchors)
    z_own, valid_own = own.new_zeros(len(anchors), rows.shape[1]), valid.new_zeros(len(anchors), rows.shape[1])
    for c in range(len(counts)):
        keys, of_class = torch.where(valid[c, :, None], rows[c], 0).to(dtype), (classes == c)[:, None]
        z = anchors @ keys.t() / temperature
        z = z + 0 * z  # an infinite similarity becomes NaN, which reaches the loss
        z_own, valid_own = torch.where(of_class, z, z_own), torch.where(of_class, valid[c], valid_own)
        negative = valid[c] & ~of_class & (classes >= 0)[:, None]
        higher = torch.maximum(top, torch.where(negative, z, lowest).amax(1)) if rows.shape[1] else top
        weight = torch.where(negative, (z - higher[:, None]).exp(), 0)
        rescale = (top - higher).exp()
        total, away, top = total * rescale + weight.sum(1), away * rescale[:, None] + weight @ keys, higher
    highest = top.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    rescale = (top - highest).exp()
    total, away = total * rescale, away * rescale[:, None]
    dist.all_reduce(total)
    level = (highest + total.log())[:, None]
    contrasted = valid_own & (total != 0)[:, None]  # without negatives the loss is 0; NaN is not 0
    l_own = torch.where(contrasted, torch.logaddexp(z_own, level), 0)
    toward_weight = torch.where(contrasted, (level - l_own).exp(), 0)
    toward = torch.zeros_like(anchors)
    for c in range(len(counts)):
        keys = torch.where(valid[c, :, None], rows[c], 0).to(dtype)
        toward += torch.where((classes == c)[:, None], toward_weight, 0) @ keys
    loss = torch.where(contrasted, l_own - z_own, 0).sum(1)
    pull = torch.where(contrasted, (highest[:, None] - l_own).exp(), 0).sum(1)
    sums = torch.cat([away, toward, torch.stack([loss, pull, valid_own.sum(1).to(dtype)], 1)], 1)
    dist.all_reduce(sums)
    mine, width = sums.chunk(world)[dist.get_rank()], own.shape[1]
    loss, pull, positives = mine[:, 2 * width :].unbind(1)
    return mine[:, :width], mine[:, width : 2 * width], loss, pull, positives
