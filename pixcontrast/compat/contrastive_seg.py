"""The losses of ContrastiveSeg, the code of Wang et al. (ICCV 2021), under the names and calls of that code.

Change ``from lib.loss.loss_contrast import ...`` or ``from lib.loss.loss_contrast_mem import ...`` to this module. The
queues of its trainer are :class:`pixcontrast.queues.PixelQueues`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .. import loss
from ..checks import check_predict, check_tensor
from ..loss import Queue


class Configer(Protocol):
    """What is asked of a ``configer``: theirs, or any object with these two methods."""

    def get(self, *key: str) -> Any: ...

    def exists(self, *key: str) -> bool: ...


class PixelContrastLoss(loss.PixelContrastLoss):
    """Their ``PixelContrastLoss``, with and without a queue: ``criterion(feats, labels, predict, queue)``.

    It differs from theirs in that a batch without anchors, with more groups than ``max_samples``, or with anchors
    without positives gives a finite loss; ``predict`` may have any resolution or be left out; everything stays on the
    device and in the dtype of ``feats``. The default variant also uses the rows of class 0 of the queue, and every row
    of the own class as a positive; ``variant="released"`` does neither, as their code.

    Args:
        configer: read are ``contrast``: ``temperature``, ``base_temperature``, ``max_samples`` and ``max_views``, and
            ``loss``, ``params``: ``ce_ignore_index`` (-1 if it is not there).
        variant: ``"paper"`` or ``"released"``.
        options: further keywords of :class:`pixcontrast.PixelContrastLoss`.
    """

    def __init__(self, configer: Configer, *, variant: str = "paper", **options: Any) -> None:
        names = ("temperature", "base_temperature", "max_samples", "max_views")
        numbers = {name: configer.get("contrast", name) for name in names}
        ignore_index = _loss_params(configer).get("ce_ignore_index", -1)
        super().__init__(**numbers, ignore_index=ignore_index, variant=variant, **options)

    @property
    def ignore_label(self) -> int:
        return self.ignore_index

    def forward(
        self,
        feats: Tensor,
        labels: Tensor | None = None,
        predict: Tensor | None = None,
        queue: Queue | Sequence[Queue] | None = None,
        **options: Any,
    ) -> Any:
        """The loss; see :meth:`pixcontrast.PixelContrastLoss.forward` for ``options`` such as ``generator``.

        Args:
            feats: ``[B, D, h, w]``, normalised by the caller.
            labels: ``[B, H, W]`` of any integer or float dtype.
            predict: ``[B, h, w]`` likewise; ``None``: all predictions count as right.
            queue: ``[C, N, D]``, a :class:`ClassMemory`, or several of them, which saves joining two queues.

        Raises:
            ValueError, TypeError: no labels, or what :class:`pixcontrast.PixelContrastLoss` raises.
        """
        if labels is None:
            raise ValueError("PixelContrastLoss: labels are needed, got None")
        check_tensor("labels", labels)
        if not isinstance(predict, Tensor):
            check_predict(predict)
        return super().forward(feats, labels.long(), None if predict is None else predict.long(), queue, **options)


class ContrastCELoss(nn.Module):
    """Their ``ContrastCELoss`` of both modules: cross-entropy plus ``loss_weight`` times the contrast.

    It differs from theirs in that the contrast is not computed while ``with_embed`` is false (theirs is multiplied by
    zero, and still stops or gives NaN), the two queues are never copied into one, and a batch without a labelled pixel
    has a cross-entropy of zero instead of NaN. As in theirs, a ``configer`` with the key ``with_memory`` means no
    contrast until both queues are there; without it, and without queues, the pixels of the batch contrast each other.

    Args:
        configer: as for :class:`PixelContrastLoss`; also ``contrast``, ``loss_weight`` and, of ``loss``, ``params``,
            ``ce_weight`` and ``ce_reduction`` if they are there.
        seg_criterion: called with logits ``[B, C, H, W]`` and the target; ``None``: cross-entropy.
        options: further keywords of :class:`PixelContrastLoss`.

    Raises:
        ValueError: the configer asks for the RMI or Lovasz loss and there is no ``seg_criterion``.
    """

    def __init__(self, configer: Configer, seg_criterion: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        for name in ("use_rmi", "use_lovasz"):
            if seg_criterion is None and configer.exists("contrast", name) and configer.get("contrast", name):
                raise ValueError(f"{type(self).__name__}: the configer sets {name}; pass that loss as seg_criterion")
        self.loss_weight = configer.get("contrast", "loss_weight")
        self.with_memory = configer.exists("contrast", "with_memory")
        self.seg_criterion = CrossEntropy(_loss_params(configer)) if seg_criterion is None else seg_criterion
        self.contrast_criterion = PixelContrastLoss(configer, **options)

    def forward(
        self,
        preds: Mapping[str, Any],
        target: Tensor,
        with_embed: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            preds: ``seg`` logits ``[B, C, h', w']`` and ``embed [B, D, h, w]``; maybe ``segment_queue`` and
                ``pixel_queue``, ``[C, N, D]`` or :class:`ClassMemory` each.
            target: ``[B, H, W]`` int64.
            with_embed: whether the contrast counts yet (their trainer: from ``warmup_iters`` on).
            generator: repeats the choice of anchors.

        Returns:
            A scalar, connected to ``seg`` and ``embed`` in every case, as distributed training needs it.
        """
        segmentation = self._segmentation(preds, target)
        queue = [preds.get("segment_queue"), preds.get("pixel_queue")]
        has_queues = all(part is not None for part in queue)
        if not with_embed or (self.with_memory and not has_queues):
            return segmentation + preds["embed"][:0].sum()  # in the graph, without reading a number that may be NaN
        contrast = self.contrast_criterion(
            preds["embed"], target, preds["seg"].argmax(1), queue if has_queues else None, generator=generator
        )
        return segmentation + self.loss_weight * contrast

    def _segmentation(self, preds: Mapping[str, Any], target: Tensor) -> Tensor:
        return self.seg_criterion(_upsampled(preds["seg"], target), target)


class ContrastAuxCELoss(ContrastCELoss):
    """Their ``ContrastAuxCELoss``: also the cross-entropy of the auxiliary logits ``preds["seg_aux"]``.

    The factors of the two are ``network``, ``loss_weights``: ``seg_loss`` and ``aux_loss`` of the configer. A
    ``seg_criterion`` is called once for each, where theirs takes both as a list.
    """

    def __init__(self, configer: Configer, seg_criterion: nn.Module | None = None, **options: Any) -> None:
        super().__init__(configer, seg_criterion, **options)
        self.seg_weights = configer.get("network", "loss_weights")

    def _segmentation(self, preds: Mapping[str, Any], target: Tensor) -> Tensor:
        auxiliary = self.seg_criterion(_upsampled(preds["seg_aux"], target), target)
        return self.seg_weights["seg_loss"] * super()._segmentation(preds, target) + (
            self.seg_weights["aux_loss"] * auxiliary
        )


class CrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy by their ``loss``, ``params``: ``ce_weight``, ``ce_reduction``, ``ce_ignore_index``.

    A batch without a labelled pixel gives a zero that is connected to the graph, not NaN.
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        weight, reduction = params.get("ce_weight"), params.get("ce_reduction", "mean")
        super().__init__(
            None if weight is None else torch.as_tensor(weight, dtype=torch.float32),
            ignore_index=params.get("ce_ignore_index", -1),
            reduction="mean" if reduction == "elementwise_mean" else reduction,  # its name before PyTorch 1.0
        )

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        labelled = (labels != self.ignore_index).any()
        return torch.where(labelled, super().forward(logits, labels), logits[:0].sum())


def _loss_params(configer: Configer) -> Mapping[str, Any]:
    return configer.get("loss", "params") if configer.exists("loss", "params") else {}


def _upsampled(logits: Tensor, target: Tensor) -> Tensor:
    return interpolate(logits, target.shape[1:], mode="bilinear", align_corners=True)
