"""The pixel contrast of Wang et al. (ICCV 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .checks import check_label_values
from .distributed import world_size
from .functional import infonce_contrast
from .memory import ClassMemory
from .select import MAX_LABELS, Anchors, all_anchors, hard_anchors, labels_at
from .sharded_infonce import infonce_over_ranks
from .stats import InfoNCEStats, infonce_stats
from .zero_loss import warn_once, why_no_anchors

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
        rows = [rows_and_counts(part)[0] for part in parts_of(queue)]
        check_label_values(labels, rows[0].shape[0] if rows else MAX_LABELS, self.ignore_index, "labels")
        anchors = self.anchors(labels, predict, generator)
        self.explain_zero(labels, anchors, queue)
        return self.contrast(features, anchors, queue, return_stats=return_stats)

    def explain_zero(self, labels: Tensor, anchors: Anchors, queue: Queue | Sequence[Queue] | None) -> None:
        """Warns, the first time, if no anchor has anything to be contrasted with, where that can be read."""
        if torch.compiler.is_compiling() or self.on_empty == "raise":
            return
        parts = [rows_and_counts(part) for part in parts_of(queue)]
        counts = [torch.full((len(rows),), rows.shape[1]) if count is None else count for rows, count in parts]
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
            rows, count = rows_and_counts(part)
            if count is None:
                count = torch.full((rows.shape[0],), rows.shape[1], dtype=torch.int64, device=rows.device)
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
        rows, counts = rows_and_counts(parts[0])
        assert counts is not None
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
    return [queue] if isinstance(queue, ClassMemory | Tensor) else list(queue)


def rows_and_counts(queue: Queue) -> tuple[Tensor, Tensor | None]:
    """Rows ``[C, N, D]`` and how many of each class are valid (``None``: all)."""
    return (queue.rows, queue.counts) if isinstance(queue, ClassMemory) else (queue, None)


def refuse_empty(taking_part: Tensor, needs: str) -> None:
    """``ValueError`` unless something takes part; waits for the device."""
    if not bool(taking_part.any()):
        raise ValueError(f"PixelContrastLoss: no class takes part: it needs {needs}")


def _diagonal(anchors: Anchors, counts: Sequence[Tensor]) -> Tensor:
    """For the r-th anchor, the r-th key if it is of the same class: its index among the keys of that class, else -1."""
    count = torch.stack(list(counts)).sum(0).roll(-1)  # keys of classes 1, 2, ..., 0
    ends = count.cumsum(0)
    number = torch.arange(len(anchors.labels), device=count.device)
    turn = torch.searchsorted(ends, number, right=True).clamp_max(len(count) - 1)
    place = number - (ends - count)[turn]
    own = ((turn + 1) % len(count) == anchors.labels) & (place < count[turn])
    return torch.where(own, place, -1)
