"""Which pixels are contrasted, at which resolution: fixed shapes, no synchronisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample


def _positions(size: int, full: int, device: torch.device) -> Tensor:
    """Index ``floor(k * full / size)`` of the pixel that stands for cell k: the nearest rule of ``interpolate``."""
    return torch.arange(size, device=device) * full // size


def labels_at(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Label map ``[B, H, W]`` at ``size = (h, w)`` by the nearest rule; integers stay integers."""
    height, width = labels.shape[-2:]
    if (height, width) == tuple(size):
        return labels
    rows = _positions(size[0], height, labels.device)
    columns = _positions(size[1], width, labels.device)
    return labels[:, rows][:, :, columns]


def logits_at(logits: Tensor, size: tuple[int, int], full: tuple[int, int]) -> Tensor:
    """Logits at the pixels that :func:`labels_at` picks.

    Equals upsampling ``logits [B, C, h', w']`` bilinearly (``align_corners=True``) to ``full = (H, W)`` and then taking
    the nearest pixel for each cell of ``size = (h, w)``, as the released code does, without ever making the full map.

    Returns:
        ``[B, C, h, w]``.
    """
    if 0 in (logits.shape[0], *size):  # which grid_sample refuses
        return logits.new_zeros((*logits.shape[:2], *size))
    steps = []
    for cells, pixels in zip(size, full, strict=True):
        at = _positions(cells, pixels, logits.device).to(logits.dtype)
        steps.append(at * (2 / max(pixels - 1, 1)) - 1)
    grid = torch.stack(torch.meshgrid(steps[1], steps[0], indexing="xy"), dim=-1)
    return grid_sample(logits, grid.expand(logits.shape[0], -1, -1, -1), mode="bilinear", align_corners=True)


def confident(logits: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Pixels whose predicted class is the label, with a probability above ``threshold`` (strictly).

    Args:
        logits: ``[B, C, h, w]`` at the resolution of the labels.
        labels: ``[B, h, w]`` int64.

    Returns:
        ``[B, h, w]`` bool.
    """
    probability, predicted = torch.softmax(logits.float(), dim=1).max(dim=1)
    return (predicted == labels) & (probability > threshold)


MAX_LABELS = 1 << 15  # the sort key of hard_anchors has so many bits for the class


class Anchors(NamedTuple):
    """Pixels that act as anchors, in a list of fixed length."""

    indices: Tensor
    """``[R]`` int64: index of the pixel in ``[B * h * w]``, or -1 for an unused place."""
    labels: Tensor
    """``[R]`` int64: class of the pixel, or -1."""


def all_anchors(labels: Tensor, ignore_index: int) -> Anchors:
    """Every valid pixel of ``labels [P]`` or ``[B, h, w]`` as an anchor, in order: R = number of pixels."""
    flat = labels.reshape(-1)
    valid = (flat != ignore_index) & (flat >= 0)
    index = torch.arange(flat.shape[0], device=flat.device)
    return Anchors(torch.where(valid, index, -1), torch.where(valid, flat, -1))


def hard_anchors(
    labels: Tensor,
    predict: Tensor,
    *,
    max_samples: int,
    max_views: int,
    ignore_index: int,
    generator: torch.Generator | None = None,
) -> Anchors:
    """Random anchors of every class of every image, half of them where the prediction is wrong (Wang et al., 2021).

    A group is a class in an image with more than ``max_views`` pixels. Each of the A groups gives
    ``V = min(max_samples // A, max_views)`` anchors: ``V // 2`` wrongly and the rest rightly predicted ones, or, where
    one kind has fewer than V / 2, all of it and more of the other. Where the released code fails, this goes on: with no
    group the list is empty; with more than ``max_samples`` groups, the first ``max_samples`` give one anchor each.

    Args:
        labels: ``[B, h, w]`` int64 in ``[0, 2^15)`` or ``ignore_index``.
        predict: ``[B, h, w]`` int64, the predicted class.
        max_samples: R, length of the list.
        max_views: anchors of a group, at most.
        ignore_index: label of pixels that take no part.
        generator: of the device of the labels, for repeatability.

    Returns:
        :class:`Anchors` with ``R = max_samples``: place ``v * A + a`` holds anchor v of group a; groups are ordered by
        image and class, within a group the wrongly predicted ones come first.
    """
    flat, device = labels.reshape(-1), labels.device
    total = flat.shape[0]
    if total == 0:
        empty = torch.full((max_samples,), -1, dtype=torch.int64, device=device)
        return Anchors(empty, empty)
    valid = (flat != ignore_index) & (flat >= 0)
    image = torch.arange(total, device=device) // (total // labels.shape[0])
    easy = (predict.reshape(-1) == flat).long()
    # one key sorts everything: image, class (0: none), right or wrong, chance
    if generator is None:  # with the argument, even None, torch.compile rejects dynamic shapes
        chance = torch.randint(0, 1 << 31, (total,), device=device)
    else:
        chance = torch.randint(0, 1 << 31, (total,), device=device, generator=generator)
    key = ((image << 16 | torch.where(valid, flat + 1, 0)) << 32) | (easy << 31) | chance
    key, order = torch.sort(key)
    pair, known = key >> 32, (key >> 32 & 0xFFFF) > 0
    starts = torch.cat([torch.ones_like(known[:1]), pair[1:] != pair[:-1]])
    group = starts.long().cumsum(0) - 1
    # numbers of each group; there are at most as many groups as pixels
    zeros = torch.zeros(total, dtype=torch.int64, device=device)
    pixels = zeros.scatter_add(0, group, known.long())
    wrong = zeros.scatter_add(0, group, (known & (key >> 31 & 1 == 0)).long())
    position = torch.arange(total, device=device)
    first = torch.full_like(position, total).scatter_reduce(0, group, position, "amin")
    taken = pixels > max_views
    rank = taken.long().cumsum(0) - 1
    groups = rank[-1:] + 1

    views = torch.clamp(max_samples // groups.clamp_min(1), 1, max_views)
    place = torch.arange(max_samples, device=device)
    view, which = place // groups.clamp_min(1), place % groups.clamp_min(1)
    used = (groups > 0) & (view < views)
    # the group of each rank; groups that are not taken write to one place too many
    of_rank = torch.zeros(max(total, max_samples) + 1, dtype=torch.int64, device=device)
    slots = torch.where(taken, rank, of_rank.shape[0] - 1)
    of_rank = of_rank.scatter(0, slots, position)
    chosen = of_rank[which]
    n_wrong, n_right = wrong[chosen], pixels[chosen] - wrong[chosen]
    keep_wrong = torch.where(
        (2 * n_wrong >= views) & (2 * n_right >= views),
        views // 2,
        torch.where(2 * n_wrong >= views, views - n_right, n_wrong),
    )
    sorted_place = first[chosen] + torch.where(view < keep_wrong, view, n_wrong + view - keep_wrong)
    index = order[sorted_place.clamp(0, total - 1)]
    return Anchors(torch.where(used, index, -1), torch.where(used, flat[index], -1))
