"""Why a loss is zero, said once, where reading values costs nothing; docs/zero_loss.md has the same at length."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .checks import readable
from .reference import MIN_ROWS


def warn_once(criterion: nn.Module, reason: str) -> None:
    """The first time that ``criterion`` has a loss of zero for a ``reason`` that the caller may not know."""
    if reason and not getattr(criterion, "warned", False):
        criterion.warned = True  # type: ignore[assignment]
        warnings.warn(
            f"PixelContrastLoss: the loss is 0: {reason}. This is said once; return_stats=True counts what takes part, "
            "docs/zero_loss.md explains it",
            stacklevel=4,
        )


def why_no_pairs(counts: Tensor, rows: Tensor) -> str:
    """For the positive objective, from pixels and memory rows of each class ``[C]``; "" for an empty memory, which is
    usual at the start, and where the loss is not zero."""
    if not readable(counts) or ((counts >= MIN_ROWS) & (rows >= MIN_ROWS)).any() or not rows.any():
        return ""
    if not counts.any():
        return "no pixel has a label that is a class and not ignore_index"
    pixels, filled = ((number >= MIN_ROWS).nonzero()[:8, 0].tolist() for number in (counts, rows))
    return f"no class has {MIN_ROWS} pixels and {MIN_ROWS} memory rows: pixels of {pixels}, rows of {filled}"


def why_no_anchors(
    labels: Tensor, anchor_labels: Tensor, max_views: int | None, ignore_index: int, counts: Sequence[Tensor] | None
) -> str:
    """For InfoNCE, from labels, the labels of the anchors (-1: none) and the rows of each class of each queue."""
    if not readable(labels):
        return ""
    valid = (labels >= 0) & (labels != ignore_index)
    if (anchor_labels >= 0).any():
        if not counts:
            return ""
        rows = torch.stack(list(counts)).sum(0)
        own = anchor_labels[anchor_labels >= 0].unique()
        if not rows.any() or rows[own].any():
            return ""
        return f"the queue has no rows of the anchors' classes {own[:8].tolist()}"
    if not valid.any():
        return "no pixel has a label that is a class and not ignore_index"
    maps = labels if labels.dim() == 3 else labels[None]
    most = max(
        int(torch.bincount(one[good]).max()) for one, good in zip(maps, valid.view_as(maps), strict=True) if good.any()
    )
    return (
        f"no class of an image has more than max_views={max_views} pixels at the resolution of the features, the "
        f"largest has {most}; lower max_views or take larger crops"
    )
