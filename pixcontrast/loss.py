"""The loss that other trainers drop in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .checks import check_label_values, check_queue
from .distributed import contrast_over_ranks, world_size
from .functional import BACKENDS, contrast_with_mean, infonce_contrast, memory_mean
from .memory import ClassMemory
from .reference import MIN_ROWS
from .select import MAX_LABELS, Anchors, all_anchors, hard_anchors, labels_at
from .stats import ContrastStats, InfoNCEStats, infonce_stats

OBJECTIVES = ("infonce", "positive")
VARIANTS = ("paper", "released")
Queue = ClassMemory | Tensor


class PixelContrastLoss(nn.Module):
    """Pixel contrast with a queue, or among the pixels of a batch.

    ``objective="infonce"``: the pixel contrast of Wang et al. (ICCV 2021), with the call of their code. Anchors are
    drawn from every class of every image, half of them where ``predict`` is wrong, and contrasted with the queue, or
    with each other::

        criterion = PixelContrastLoss(temperature=0.1, max_samples=1024, max_views=100, ignore_index=255)
        loss = criterion(normalize(embedding), labels, predict)

    ``objective="positive"``: each pixel is drawn towards the queue's rows of its class (Alonso et al., ICCV 2021)::

        criterion = PixelContrastLoss(objective="positive", ignore_index=255)
        loss = criterion(embedding, labels, queue=memory)

    Args:
        temperature: divides the similarities (infonce).
        base_temperature: the loss is multiplied by ``temperature / base_temperature`` (infonce).
        max_samples: anchors of a batch, at most (infonce); ``None``, with ``max_views=None``: every valid pixel.
        max_views: anchors of a class of an image, at most; smaller classes are left out (infonce).
        ignore_index: label of pixels that take no part.
        variant: ``"paper"``, or ``"released"`` to repeat what the code of Wang et al. computes with a queue: see
            ``skip_class0`` and ``diagonal``. Where that code stops or gives NaN, both variants go on.
        skip_class0: with a queue, do not use the rows of class 0, and put as many zero rows in their place; ``None``:
            as the variant says.
        diagonal: with a queue, key number r is no positive of anchor number r, keys counted from class 1 on and class 0
            last; ``None``: as the variant says.
        objective: ``"infonce"`` or ``"positive"``.
        loss_weight: factor of the loss. Setting it here instead of multiplying the result saves one pass over the
            gradient: the kernel writes the gradient with the factor already in it.
        on_empty: ``"zero"`` gives a zero that is connected to the graph when nothing takes part; ``"raise"`` raises
            ``ValueError`` (and waits for the device to know).
        backend: ``"auto"`` takes the compiled kernels where there are some for the device, else plain PyTorch;
            ``"extension"`` and ``"reference"`` insist.
        across_ranks: with several processes, the mean of a class runs over the pixels of all of them, so that the loss
            and the averaged gradients are those of one process with the whole batch (positive; the queue must be one
            that all ranks share, with ``sync="gather"`` or ``"reduce"``, and all must call equally often). Otherwise
            each rank has the loss of its own pixels, as with the usual losses.

    Raises:
        ValueError: an unknown option, or numbers out of range.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        base_temperature: float = 0.07,
        max_samples: int | None = 1024,
        max_views: int | None = 100,
        ignore_index: int = -1,
        variant: str = "paper",
        *,
        skip_class0: bool | None = None,
        diagonal: bool | None = None,
        objective: str = "infonce",
        loss_weight: float = 1.0,
        on_empty: str = "zero",
        backend: str = "auto",
        across_ranks: bool = False,
    ) -> None:
        super().__init__()
        options: dict[str, tuple[str, tuple[str, ...]]] = {"objective": (objective, OBJECTIVES)}
        options |= {"variant": (variant, VARIANTS)}
        options |= {"on_empty": (on_empty, ("zero", "raise")), "backend": (backend, BACKENDS)}
        for name, (given, known) in options.items():
            if given not in known:
                raise ValueError(f"PixelContrastLoss: {name} must be one of {known}, got {given!r}")
        if (max_samples is None) != (max_views is None):
            raise ValueError(
                f"PixelContrastLoss: max_samples and max_views must both be numbers or both be None, got {max_samples} "
                f"and {max_views}"
            )
        numbers = {"temperature": temperature, "base_temperature": base_temperature}
        numbers |= {"max_samples": max_samples or 1, "max_views": max_views or 1}
        for name, number in numbers.items():
            if not number > 0:
                raise ValueError(f"PixelContrastLoss: {name} must be above 0, got {number}")
        if across_ranks and objective != "positive":
            raise ValueError('PixelContrastLoss: across_ranks is for objective="positive" alone')
        self.across_ranks = across_ranks
        self.objective, self.variant, self.ignore_index = objective, variant, ignore_index
        self.temperature, self.base_temperature = temperature, base_temperature
        self.max_samples, self.max_views = max_samples, max_views
        self.skip_class0 = variant == "released" if skip_class0 is None else skip_class0
        self.diagonal = variant == "released" if diagonal is None else diagonal
        self.loss_weight, self.on_empty, self.backend = loss_weight, on_empty, backend

    def extra_repr(self) -> str:
        shown = f"objective={self.objective!r}, ignore_index={self.ignore_index}, loss_weight={self.loss_weight}"
        if self.objective == "positive":
            return shown
        return f"temperature={self.temperature}, max_samples={self.max_samples}, max_views={self.max_views}, {shown}"

    def forward(
        self,
        feats: Tensor,
        labels: Tensor,
        predict: Tensor | None = None,
        queue: Queue | Sequence[Queue] | None = None,
        *,
        weight_logits: Tensor | None = None,
        queue_weight_logits: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, InfoNCEStats] | tuple[Tensor, ContrastStats]:
        """Contrast ``feats``.

        Args:
            feats: ``[B, D, h, w]`` or rows ``[P, D]``. For infonce used as they are: normalise them before. For
                positive of any norm: normalised here.
            labels: ``[B, H, W]`` at any resolution (brought to ``h, w`` by the nearest rule), or ``[P]``; int64. Each
                is a class of the queue (without a queue: in ``[0, 2^15)``) or ``ignore_index``; checked on CPUs.
            predict: predicted classes like ``labels``, at any resolution (infonce; ``None``: all count as right).
            queue: a :class:`ClassMemory` or rows ``[C, N, D]``; for infonce also several of them (a pixel and a region
                queue, say), which are never copied into one, or ``None`` to contrast the anchors with each other.
            weight_logits: ``[P]`` or ``[B, h, w]`` logits of the pixels' attention weights (positive).
            queue_weight_logits: ``[C, N]`` logits of the rows' attention weights (positive).
            generator: of the device of the labels, to repeat the choice of anchors (infonce).
            return_stats: also return statistics.

        Returns:
            A scalar in float32 (float64 for float64 features), with :class:`InfoNCEStats` or :class:`ContrastStats`.

        Raises:
            ValueError, TypeError: arguments that do not fit, named, with what was given and what is expected.
        """
        if feats.dim() == 4 and labels.dim() == 3:
            labels = labels_at(labels, (feats.shape[2], feats.shape[3]))
        if feats.dim() not in (2, 4):
            raise ValueError(f"features must be [P, D] or [B, D, H, W], got {tuple(feats.shape)}")
        shape = (feats.shape[0], *feats.shape[2:])
        if tuple(labels.shape) != shape:
            raise ValueError(f"labels must have shape {shape}, got {tuple(labels.shape)}")
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64, got {labels.dtype}; use labels.long()")
        if self.objective == "infonce":
            if weight_logits is not None or queue_weight_logits is not None:
                raise ValueError('weight_logits and queue_weight_logits are for objective="positive" alone')
            rows = [_rows_and_counts(part)[0] for part in _parts(queue)]
            check_label_values(labels, rows[0].shape[0] if rows else MAX_LABELS, self.ignore_index, "labels")
            return self.contrast(feats, self.anchors(labels, predict, generator), queue, return_stats=return_stats)
        if queue is None or not isinstance(queue, ClassMemory | Tensor):
            raise ValueError(f'objective="positive" needs queue, a ClassMemory or a tensor, got {type(queue).__name__}')
        return self._positive(feats, labels, queue, weight_logits, queue_weight_logits, return_stats)

    def _positive(
        self,
        feats: Tensor,
        labels: Tensor,
        queue: Queue,
        weight_logits: Tensor | None,
        queue_weight_logits: Tensor | None,
        return_stats: bool,
    ) -> Tensor | tuple[Tensor, ContrastStats]:
        rows, _ = _rows_and_counts(queue)
        check_queue(rows, feats)
        if isinstance(queue, ClassMemory):
            mean, counts = queue.mean(queue_weight_logits, self.backend)
        else:
            counts = torch.full((rows.shape[0],), rows.shape[1], dtype=torch.int64, device=rows.device)
            mean = memory_mean(rows, counts, queue_weight_logits, self.backend)
        contrast = contrast_over_ranks if self.across_ranks and world_size() > 1 else contrast_with_mean
        output = contrast(
            feats,
            labels,
            mean,
            counts,
            weight_logits=weight_logits,
            ignore_index=self.ignore_index,
            loss_weight=self.loss_weight,
            backend=self.backend,
        )
        if not return_stats and self.on_empty == "zero":
            return output.loss
        taking_part = (output.counts >= MIN_ROWS) & (counts >= MIN_ROWS)
        self._complain_if_empty(taking_part, "two pixels with its label and two rows in the memory")
        if not return_stats:
            return output.loss
        similarity = torch.where(taking_part, 1 - output.class_loss, float("nan"))
        capacity = queue.total_capacity if isinstance(queue, ClassMemory) else rows.shape[1]
        return output.loss, ContrastStats(output.counts, similarity, counts / capacity)

    def contrast(
        self,
        feats: Tensor,
        anchors: Anchors,
        queue: Queue | Sequence[Queue] | None = None,
        *,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, InfoNCEStats]:
        """InfoNCE of anchors that are chosen already; arguments and result as for :meth:`forward`."""
        queues, counts = [], []
        for part in _parts(queue):
            if isinstance(part, ClassMemory) and part.sync == "reduce":
                raise ValueError(
                    'objective="infonce" contrasts anchors with every row, and a ClassMemory with sync="reduce" has '
                    'only those of its own rank: make it with sync="gather" or "local"'
                )
            rows, count = _rows_and_counts(part)
            if count is None:
                count = torch.full((rows.shape[0],), rows.shape[1], dtype=torch.int64, device=rows.device)
            if self.skip_class0:
                rows, count = rows.clone(), count.clone()
                rows[0], count[0] = 0, rows.shape[1]
            queues.append(rows)
            counts.append(count)
        excluded = _diagonal(anchors, counts) if queues and self.diagonal else None
        output = infonce_contrast(
            feats,
            anchors,
            queues,
            queue_counts=counts,
            excluded=excluded,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            loss_weight=self.loss_weight,
            backend=self.backend,
        )
        self._complain_if_empty(output.positives > 0, "an anchor with its label and another key of that class")
        if not return_stats:
            return output.loss
        return output.loss, infonce_stats(feats, anchors, queues, counts, output)

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

    def _complain_if_empty(self, taking_part: Tensor, needs: str) -> None:
        if self.on_empty == "raise" and not bool(taking_part.any()):
            raise ValueError(f"PixelContrastLoss: no class takes part: it needs {needs}")


def _parts(queue: Queue | Sequence[Queue] | None) -> list[Queue]:
    if queue is None:
        return []
    return [queue] if isinstance(queue, ClassMemory | Tensor) else list(queue)


def _rows_and_counts(queue: Queue) -> tuple[Tensor, Tensor | None]:
    return (queue.rows, queue.counts) if isinstance(queue, ClassMemory) else (queue, None)


def _diagonal(anchors: Anchors, counts: Sequence[Tensor]) -> Tensor:
    """For anchor number r, key number r if it is of the anchor's class: its place among that class's keys, else -1."""
    count = torch.stack(list(counts)).sum(0).roll(-1)  # keys of classes 1, 2, ..., 0
    ends = count.cumsum(0)
    number = torch.arange(len(anchors.labels), device=count.device)
    turn = torch.searchsorted(ends, number, right=True).clamp_max(len(count) - 1)
    place = number - (ends - count)[turn]
    own = ((turn + 1) % len(count) == anchors.labels) & (place < count[turn])
    return torch.where(own, place, -1)
