"""The pixel contrast of Wang et al. (ICCV 2021)."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .checks import check_label_values, check_tensor, readable
from .distributed import world_size
from .functional import infonce_contrast
from .memory import ClassMemory
from .select import MAX_LABELS, Anchors, all_anchors, hard_anchors, labels_at
from .sharded_infonce import infonce_over_ranks
from .stats import InfoNCEStats, infonce_stats

Queue = ClassMemory | Tensor


class InfoNCELoss(nn.Module):
    """What :class:`PixelContrastLoss` is with ``objective="infonce"``; see there for the arguments."""

    def __init__(
        self,
        temperature: float = 0.1,
        base_temperature: float = 0.07,
        max_samples: int | None = 1024,
        max_views: int | None = 100,
        ignore_index: int = 255,
        *,
        skip_class0: bool = False,
        diagonal: bool = False,
        loss_weight: float = 1.0,
        on_empty: str = "zero",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if (max_samples is None) != (max_views is None):
            raise ValueError(
                f"PixelContrastLoss: max_samples and max_views must both be numbers or both be None, got {max_samples} "
                f"and {max_views}"
            )
        numbers = {"temperature": temperature, "base_temperature": base_temperature}
        numbers |= {"max_samples": max_samples or 1, "max_views": max_views or 1}
        for name, number in numbers.items():
            if not 0 < number < math.inf:
                raise ValueError(f"PixelContrastLoss: {name} must be above 0 and finite, got {number}")
        self.temperature, self.base_temperature = temperature, base_temperature
        self.max_samples, self.max_views, self.ignore_index = max_samples, max_views, ignore_index
        self.skip_class0, self.diagonal = skip_class0, diagonal
        self.loss_weight, self.on_empty, self.backend = loss_weight, on_empty, backend

    def extra_repr(self) -> str:
        names = ("temperature", "max_samples", "max_views", "ignore_index", "loss_weight")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        predict: Tensor | None = None,
        queue: Queue | Sequence[Queue] | None = None,
        *,
        generator: torch.Generator | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, InfoNCEStats]:
        """The loss of anchors drawn from ``labels`` at the resolution of ``features``."""
        parts = parts_of(queue)
        check_label_values(labels, len(rows_of(parts[0])) if parts else MAX_LABELS, self.ignore_index, "labels")
        anchors = self.anchors(labels, predict, generator)
        output = self.contrast(features, anchors, parts, return_stats=return_stats)
        self.explain_zero(labels, anchors, parts)
        return output

    def explain_zero(self, labels: Tensor, anchors: Anchors, queue: Queue | Sequence[Queue] | None) -> None:
        """Warns, the first time, if no anchor has anything to be contrasted with, where that can be read."""
        if self.on_empty == "zero" and readable(labels):
            counts = [counts_of(part) for part in parts_of(queue)]
            warn_once(self, why_no_anchors(labels, anchors.labels, self.max_views, self.ignore_index, counts))

    def contrast(
        self,
        features: Tensor,
        anchors: Anchors,
        queue: Queue | Sequence[Queue] | None = None,
        *,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, InfoNCEStats]:
        """InfoNCE of anchors that are chosen already; arguments and result as for :meth:`forward`."""
        parts = parts_of(queue)
        if any(isinstance(part, ClassMemory) and part.sync == "reduce" for part in parts) and world_size() > 1:
            return self._contrast_over_ranks(features, anchors, parts, return_stats)
        queues, counts = [], []
        for part in parts:
            rows, count = rows_of(part), counts_of(part)
            if self.skip_class0:
                rows, count = rows.clone(), count.clone()
                rows[0], count[0] = 0, rows.shape[1]
            queues.append(rows)
            counts.append(count)
        excluded = _diagonal(anchors, counts) if queues and self.diagonal else None
        output = infonce_contrast(
            features,
            anchors,
            queues,
            queue_counts=counts,
            excluded=excluded,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            loss_weight=self.loss_weight,
            backend=self.backend,
        )
        if self.on_empty == "raise":
            refuse_empty(output.positives > 0, "an anchor with its label and another key of that class")
        if not return_stats:
            return output.loss
        return output.loss, infonce_stats(features, anchors, queues, counts, output)

    def _contrast_over_ranks(
        self, features: Tensor, anchors: Anchors, parts: Sequence[Queue], return_stats: bool
    ) -> Tensor | tuple[Tensor, InfoNCEStats]:
        if len(parts) > 1 or self.skip_class0 or self.diagonal:
            raise ValueError(
                'PixelContrastLoss: a ClassMemory with sync="reduce" must be the only queue, and variant "paper"; else '
                'make it with sync="gather"'
            )
        rows, counts = rows_of(parts[0]), counts_of(parts[0])
        factors = self.temperature, self.base_temperature, self.loss_weight
        output = infonce_over_ranks(features, anchors, rows, counts, *factors)
        if not return_stats:
            return output.loss
        return output.loss, infonce_stats(features, anchors, [rows], [counts], output)

    def anchors(
        self, labels: Tensor, predict: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Anchors:
        """The anchors that :meth:`forward` draws from labels at feature resolution ``[B, h, w]`` or ``[P]``."""
        if self.max_samples is None or self.max_views is None:
            return all_anchors(labels, self.ignore_index)
        maps = labels if labels.dim() == 3 else labels[None, None]
        if predict is None:
            predict = maps
        elif predict.dim() == 3:
            predict = labels_at(predict, (maps.shape[1], maps.shape[2]))
        if predict.numel() != labels.numel():
            raise ValueError(f"predict must be like labels {tuple(labels.shape)}, got {tuple(predict.shape)}")
        return hard_anchors(
            maps,
            predict.reshape(maps.shape),
            max_samples=self.max_samples,
            max_views=self.max_views,
            ignore_index=self.ignore_index,
            generator=generator,
        )


def parts_of(queue: Queue | Sequence[Queue] | None) -> list[Queue]:
    """The queues that were given as one, several or none."""
    if queue is None:
        return []
    parts = list(queue) if isinstance(queue, Sequence) else [queue]
    for part in parts:
        check_tensor("queue", rows_of(part))
    return parts


def rows_of(queue: Queue) -> Tensor:
    """Its rows ``[C, N, D]``."""
    return queue.rows if isinstance(queue, ClassMemory) else queue


def counts_of(queue: Queue) -> Tensor:
    """How many rows of each class are valid ``[C]``: those that a memory counts, all of a tensor."""
    if isinstance(queue, ClassMemory):
        return queue.counts
    return torch.full((len(queue),), queue.shape[1], dtype=torch.int64, device=queue.device)


def refuse_empty(taking_part: Tensor, needs: str) -> None:
    """``ValueError`` unless something takes part; waits for the device."""
    if not bool(taking_part.any()):
        raise ValueError(f"PixelContrastLoss: no class takes part: it needs {needs}")


def warn_once(criterion: nn.Module, reason: str) -> None:
    """Says why the loss is zero, if there is a ``reason`` and none was said before."""
    if reason and not getattr(criterion, "warned", False):
        criterion.warned = True  # type: ignore[assignment]
        level = 1  # of the frame that called the loss or the branch
        while sys._getframe(level).f_globals.get("__name__", "").split(".")[0] in ("torch", "pixcontrast"):
            level += 1
        warnings.warn(
            f"PixelContrastLoss: the loss is 0: {reason}. This is said once; return_stats=True counts what takes part, "
            "docs/zero_loss.md explains it",
            stacklevel=level + 1,
        )


def why_no_anchors(
    labels: Tensor, anchor_labels: Tensor, max_views: int | None, ignore_index: int, counts: Sequence[Tensor]
) -> str:
    """Why no anchor is contrasted, from labels, the labels of the anchors (-1: none) and the rows of each class of each
    queue; "" if one is, and for empty queues, which are usual at the start."""
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


def _diagonal(anchors: Anchors, counts: Sequence[Tensor]) -> Tensor:
    """For the r-th anchor, the r-th key if it is of the same class: its index among the keys of that class, else -1."""
    count = torch.stack(list(counts)).sum(0).roll(-1)  # keys of classes 1, 2, ..., 0
    ends = count.cumsum(0)
    number = torch.arange(len(anchors.labels), device=count.device)
    turn = torch.searchsorted(ends, number, right=True).clamp_max(len(count) - 1)
    place = number - (ends - count)[turn]
    own = ((turn + 1) % len(count) == anchors.labels) & (place < count[turn])
    return torch.where(own, place, -1)
