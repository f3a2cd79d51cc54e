"""The class-wise memory contrast of Alonso et al. (ICCV 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import check_queue, readable
from .distributed import contrast_over_ranks, world_size
from .functional import contrast_with_mean, memory_mean
from .loss_infonce import Queue, counts_of, refuse_empty, rows_of, warn_once
from .memory import ClassMemory
from .reference import MIN_ROWS
from .stats import ContrastStats


class PositiveLoss(nn.Module):
    """What :class:`PixelContrastLoss` is with ``objective="positive"``; see there for the arguments."""

    def __init__(
        self,
        ignore_index: int = 255,
        *,
        loss_weight: float = 1.0,
        on_empty: str = "zero",
        backend: str = "auto",
        across_ranks: bool = False,
    ) -> None:
        super().__init__()
        self.ignore_index, self.loss_weight, self.on_empty = ignore_index, loss_weight, on_empty
        self.backend, self.across_ranks = backend, across_ranks

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, loss_weight={self.loss_weight}"

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        queue: Queue,
        *,
        weight_logits: Tensor | None = None,
        queue_weight_logits: Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, ContrastStats]:
        """The loss of ``features`` with ``labels`` at their resolution."""
        rows = rows_of(queue)
        check_queue(rows, features)
        if isinstance(queue, ClassMemory):
            mean, counts = queue.mean(queue_weight_logits, self.backend)
        else:
            counts = counts_of(queue)
            mean = memory_mean(rows, counts, queue_weight_logits, self.backend)
        contrast = contrast_over_ranks if self.across_ranks and world_size() > 1 else contrast_with_mean
        output = contrast(
            features,
            labels,
            mean,
            counts,
            weight_logits=weight_logits,
            ignore_index=self.ignore_index,
            loss_weight=self.loss_weight,
            backend=self.backend,
        )
        if self.on_empty == "zero":
            warn_once(self, why_no_pairs(output.counts, counts) if readable(counts) else "")
        if not return_stats and self.on_empty == "zero":
            return output.loss
        taking_part = (output.counts >= MIN_ROWS) & (counts >= MIN_ROWS)
        if self.on_empty == "raise":
            refuse_empty(taking_part, "two pixels with its label and two rows in the memory")
        if not return_stats:
            return output.loss
        similarity = torch.where(taking_part, 1 - output.class_loss, float("nan"))
        capacity = queue.total_capacity if isinstance(queue, ClassMemory) else rows.shape[1]
        return output.loss, ContrastStats(output.counts, similarity, counts / capacity)


def why_no_pairs(counts: Tensor, rows: Tensor) -> str:
    """Why no class takes part, from pixels and memory rows of each class ``[C]``; "" if one does, and for an empty
    memory, which is usual at the start."""
    if ((counts >= MIN_ROWS) & (rows >= MIN_ROWS)).any() or not rows.any():
        return ""
    if not counts.any():
        return "no pixel has a label that is a class and not ignore_index"
    pixels, filled = ((number >= MIN_ROWS).nonzero()[:8, 0].tolist() for number in (counts, rows))
    return f"no class has {MIN_ROWS} pixels and {MIN_ROWS} memory rows: pixels of {pixels}, rows of {filled}"
